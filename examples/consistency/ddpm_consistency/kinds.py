"""What the entry points return: names, and what builds them, without PyTorch."""

from ddpm.config.kinds import ObjectiveKind, SamplerKind

OBJECTIVE = ObjectiveKind(
    "ddpm_consistency.objective:consistency",
    (
        "schedule.kind",
        "schedule.num_timesteps",
        "objective.predict",
        "objective.variance",
        "objective.timesteps",
    ),
    process="consistency",
)
SAMPLER = SamplerKind(
    "ddpm_consistency.sampler:multistep",
    ("sample.spacing", "sample.clip_x_0"),
    process="consistency",
    num_sample_steps=2,
    timesteps="ddpm_consistency.sampler:spaced_before_the_last",
)
