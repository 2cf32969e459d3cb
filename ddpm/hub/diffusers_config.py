"""Conversion of net and schedule configs to and from diffusers' UNet2DModel and DDPMScheduler.

A setting that the other side cannot express is refused. Names: diffusers 0.35 to 0.42.
"""

import math
from collections.abc import Mapping
from typing import Any

from ddpm.build import resolve_sample
from ddpm.config import Config, ObjectiveConfig, SampleConfig, ScheduleConfig, UNetConfig, from_json, to_json
from ddpm.diffusion import schedules
from ddpm.models.layers import EMBEDDED_TIMESTEPS, NORM_EPS
from ddpm.utils.errors import UserError

PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
"""Ours -> diffusers'; v has the same sign in both."""
VARIANCES = {"beta_tilde": "fixed_small", "beta": "fixed_large", "learned": "learned_range"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
# Settings of a scheduler that concern only samplers that are not exported.
_SAMPLING_ALONE = ("timestep_spacing", "steps_offset", "dynamic_thresholding_ratio", "sample_max_value")


def unet_of(config: Config) -> UNetConfig:
    """The U-Net's config.

    Raises:
        UserError: the net is not a U-Net.
    """
    if not isinstance(config.model, UNetConfig):
        raise UserError(
            f"model.net is {config.model.net}; a DDPMPipeline of diffusers has a UNet2DModel, so only the net unet "
            "can become one; use --format pt2"
        )
    return config.model


def unet_config(config: Config) -> dict[str, Any]:
    """All arguments with which UNet2DModel computes what our net computes.

    Raises:
        AssertionError: a net with labels.
    """
    model, stretched = unet_of(config), config.schedule.num_timesteps != EMBEDDED_TIMESTEPS
    assert model.num_classes == 0, "labels are folded into a bias before"
    sizes = [model.image_size >> level for level in range(len(model.width_multipliers))]
    attention = ["Attn" if size in model.attention_resolutions else "" for size in sizes]
    return {
        "sample_size": model.image_size,
        "in_channels": model.channels,
        "out_channels": model.channels * (2 if config.objective.variance == "learned" else 1),
        "center_input_sample": False,
        "time_embedding_type": "learned" if stretched else "positional",
        "num_train_timesteps": config.schedule.num_timesteps if stretched else None,
        "time_embedding_dim": None,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "down_block_types": [f"{kind}DownBlock2D" for kind in attention],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attention)],
        "block_out_channels": [model.base_width * multiplier for multiplier in model.width_multipliers],
        "layers_per_block": model.blocks_per_resolution,
        "mid_block_scale_factor": 1,
        "downsample_padding": 0,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "dropout": model.dropout,
        "act_fn": "silu",
        "attention_head_dim": model.attention_head_dim,
        "norm_num_groups": model.norm_groups,
        "attn_norm_num_groups": None,
        "norm_eps": NORM_EPS,
        "resnet_time_scale_shift": "default",
        "add_attention": model.middle_attention,
        "class_embed_type": None,
        "num_class_embeds": None,
    }


def scheduler_config(config: Config) -> dict[str, Any]:
    """The arguments of DDPMScheduler for our schedule, prediction, and the mean and variance of `ancestral`."""
    schedule, sample = config.schedule, resolve_sample(config.sample, config.objective)
    if sample.variance not in VARIANCES:
        raise UserError(
            f"sample.variance is {sample.variance}; a DDPMScheduler supports {', '.join(VARIANCES)}"
        )
    betas: dict[str, Any]
    match schedule.kind:
        case "linear" | "scaled_linear":
            betas = {"beta_schedule": SCHEDULES[schedule.kind]}
            betas |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
        case "cosine" if (schedule.cosine_s, schedule.max_beta) == (0.008, 0.999):
            betas = {"beta_schedule": SCHEDULES["cosine"]}
        case _:
            betas = {"trained_betas": schedules.build(schedule).beta.tolist()}
    return {
        "num_train_timesteps": schedule.num_timesteps,
        **betas,
        "prediction_type": PREDICTIONS[config.objective.predict],
        "variance_type": VARIANCES[sample.variance],
        "clip_sample": sample.mean == "clipped",
        "clip_sample_range": 1.0,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
        "timestep_spacing": "linspace",  # with fewer than T steps both ends matter, as in timesteps.uniform
    }


def config_of(unet: Mapping[str, Any], scheduler: Mapping[str, Any], where: str) -> Config:
    """Our config for diffusers' configs. It is exported again and compared, so that no setting is lost.

    Raises:
        UserError: the two differ.
    """
    widths = list(unet["block_out_channels"])
    side = unet["sample_size"]
    if not isinstance(side, int):
        raise UserError(f"{where}/unet: sample_size is {side}; it must be one number: our images are square")
    base_width = math.gcd(*widths)
    sizes = [side >> level for level in range(len(widths))]
    model = UNetConfig(
        image_size=side,
        channels=unet["in_channels"],
        base_width=base_width,
        width_multipliers=tuple(width // base_width for width in widths),
        blocks_per_resolution=unet["layers_per_block"],
        attention_resolutions=tuple(
            size for size, kind in zip(sizes, unet["down_block_types"], strict=False) if "Attn" in kind
        ),
        attention_head_dim=unet["attention_head_dim"],
        middle_attention=unet["add_attention"],
        norm_groups=unet["norm_num_groups"],
        dropout=unet["dropout"],
    )
    schedule = ScheduleConfig(
        kind=_ours(SCHEDULES, scheduler, "beta_schedule", where),
        num_timesteps=scheduler["num_train_timesteps"],
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
    )
    variance = _ours(VARIANCES, scheduler, "variance_type", where)
    sample = SampleConfig(mean="clipped" if scheduler["clip_sample"] else "plain", variance=variance)
    objective = ObjectiveConfig(
        predict=_ours(PREDICTIONS, scheduler, "prediction_type", where),
        variance="learned" if variance == "learned" else "fixed",
    )
    config = Config(schedule=schedule, objective=objective, model=model, sample=sample)
    config = from_json(to_json(config), where)  # checks every type
    _check_same(f"{where}/unet", unet, unet_config(config))
    expected = scheduler_config(config)
    _check_same(f"{where}/scheduler", scheduler, expected | {"trained_betas": expected.get("trained_betas")})
    return config


def _ours(names: Mapping[str, str], scheduler: Mapping[str, Any], key: str, where: str) -> Any:
    """The key of `names` whose value is scheduler[key]."""
    for ours, theirs in names.items():
        if scheduler[key] == theirs:
            return ours
    raise UserError(
        f"{where}/scheduler: {key} is {scheduler[key]!r}; it must be one of {', '.join(names.values())}"
    )


def _check_same(where: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for key, right in ours.items():
        got = theirs[key]
        got = list(got) if isinstance(got, tuple) else got
        if got != right and key not in _SAMPLING_ALONE:
            raise UserError(f"{where}: {key} is {got!r:.80}; in our architecture it is {right!r:.80}")
