"""Configurations to start from."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from ddpm.config.tree import (
    ClusterConfig,
    Config,
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
    SampleConfig,
    ScheduleConfig,
    TrainConfig,
    UNetConfig,
)

# What the presets for two cores have in common.
SMALL_NET = UNetConfig(
    channels=1,
    base_width=32,
    width_multipliers=(1, 2, 2, 2),
    blocks_per_resolution=1,
    attention_resolutions=(8,),
    norm_groups=8,
)
SHORT_RUN = TrainConfig(log_every_images=6_400, checkpoint_every_images=12_800)

DIGITS = Config(
    data=DataConfig(source="digits"),
    schedule=ScheduleConfig(kind="cosine", num_timesteps=500),
    model=replace(
        SMALL_NET, image_size=8, base_width=24, width_multipliers=(1, 2, 2), attention_resolutions=(4,)
    ),
    optim=OptimConfig(lr=4e-3, lr_warmup_images=6_400, lr_schedule="cosine", ema_decay=0.995),
    train=replace(SHORT_RUN, total_images=144_000, sample_every_images=24_000, held_out_images=297),
    # The net is too small for two threads (benchmarks/runtime.md, busy.md).
    cluster=ClusterConfig(threads_per_worker=1),
)

FASHION_MNIST = Config(
    data=DataConfig(source="fashion-mnist"),
    schedule=ScheduleConfig(kind="cosine"),
    objective=ObjectiveConfig(predict="v", weight="min_snr"),
    model=replace(SMALL_NET, base_width=16),
    optim=OptimConfig(lr=2e-3, lr_warmup_images=3_200, lr_schedule="cosine", ema_decay=0.999),
    train=replace(
        SHORT_RUN, total_images=160_000, batch_size=32, micro_batch_size=16, sample_every_images=32_000
    ),
    sample=SampleConfig(sampler="dpmpp_2m", num_sample_steps=20, eta=1.0, sigma_min=0.08),
)
"""`ddpm train fashion-mnist --workers 2`: eight minutes on two cores. KID-classifier is then 0.02 ± 0.01,
and why sigma_min is not 0: benchmarks/samplers.md. What was tried: benchmarks/quality.md."""

FOLDER = Config(
    schedule=ScheduleConfig(kind="cosine"),
    objective=ObjectiveConfig(predict="v", weight="min_snr", min_snr_gamma=25.0),
    model=replace(SMALL_NET, base_width=16, channels=3),
    optim=OptimConfig(kind="muon", lr=8e-3, lr_warmup_images=3_200, lr_schedule="cosine", ema_decay=0.999),
    train=replace(
        SHORT_RUN,
        total_images=160_000,
        batch_size=32,
        micro_batch_size=4,
        sample_every_images=32_000,
        precision="bfloat16",
        compile=None,
    ),
    sample=SampleConfig(sampler="dpmpp_2m", num_sample_steps=20, eta=1.0, sigma_min=0.08),
)
"""`ddpm train folder PATH --workers 2`. The learning rate is among the best of those tried on the digits and
Fashion-MNIST (benchmarks/optimizers.md); why gamma is 25: benchmarks/samplers.md; beside diffusers: quality.md."""

CIFAR10 = Config(
    data=DataConfig(source="torchvision:cifar10", horizontal_flip=True),
    model=UNetConfig(dropout=0.1),
    optim=OptimConfig(lr=2e-4, lr_warmup_images=640_000),
    train=TrainConfig(total_images=102_400_000, micro_batch_size=8, precision="bfloat16", compile=None),
)

CELEBA64 = Config(
    data=DataConfig(source="torchvision:celeba", horizontal_flip=True),
    model=UNetConfig(image_size=64, width_multipliers=(1, 1, 2, 2, 4)),
    optim=OptimConfig(lr=2e-4, lr_warmup_images=640_000),
    train=TrainConfig(total_images=64_000_000, micro_batch_size=8, precision="bfloat16", compile=None),
    sample=SampleConfig(num_images=36),
)

PRESETS = {
    "digits": DIGITS,
    "fashion-mnist": FASHION_MNIST,
    "folder": FOLDER,
    "cifar10": CIFAR10,
    "celeba64": CELEBA64,
}

ABOUT = {
    "digits": (
        "8x8 grey, built in (scikit-learn), 0.6 M weights. Two minutes on two cores, after the start."
    ),
    "fashion-mnist": (
        "32x32 grey (28x28 padded), from Debian's dataset-fashion-mnist or IDX files; 0.4 M weights. 8 minutes."
    ),
    "folder": (
        "your own pictures, `folder PATH`: 8x8 to 64x64, or up to 256x256 with --autoencoder. Nothing to tune."
    ),
    "cifar10": "32x32 colour: Ho et al. 2020, Appendix B, 35.7 M weights; 800,000 steps of 128 in the paper. For GPUs.",
    "celeba64": "64x64 colour: the same net, one resolution deeper. For GPUs.",
}
"""A line about each preset: its data, its cost, its result."""

EXAMPLES = {"glyphs": "it is an example: examples/glyphs/README.md has the command"}
"""Presets that examples have, and how they are used."""


NetSize = Literal["small", "medium"]


@dataclass(frozen=True)
class Images:
    """The images of the preset `folder`, and the flags that choose its net."""

    path: str | None = None
    """A folder of images."""
    shards: str | None = None
    """A data set, if there is no `path`."""
    size: int | None = None
    """Side at which images are prepared; None: by the images."""
    net: NetSize = "small"
    autoencoder: str | None = None
    """KIND:WEIGHTS; None: the net sees pixels."""


@dataclass(frozen=True)
class PresetArguments:
    """A preset and its changes: the arguments of commands that begin with PRESET."""

    preset: tyro.conf.Suppress[str]
    config: Annotated[Config, tyro.conf.arg(name="")]
    file: Annotated[str | None, tyro.conf.arg(name="config", metavar="FILE")] = None
    """JSON file of changes to the preset, such as a search's best.json; flags are applied after it."""
    net: NetSize = "small"
    """folder: small is for two cores, medium for a GPU and hours."""
    verbose: bool = False
    """Show Ray's messages, and tracebacks."""
    base: tyro.conf.Suppress[Any] = None
    """The preset's own config; that of `folder PATH` is derived from the images."""
