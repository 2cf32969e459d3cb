"""The configuration of a run, as one tree of frozen dataclasses.

The tree is the command line (tyro), the MLflow parameters (`flatten`) and the `config.json` of a
checkpoint (`to_json`, `from_json`). Sampling and evaluation rebuild the net from that file alone.
Unknown keys are errors; nothing here is ever executed.
"""

import dataclasses
import json
import os
import reprlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from ddpm.utils import plugins, strict_json
from ddpm.utils.errors import UserError

T = TypeVar("T")

# What the command lines offer. Each is the keys of a table, which says what is built; tests/test_tables.py holds them
# equal. The tables lie with what they build, and this module imports neither PyTorch nor a higher package.
ScheduleKind = Literal["linear", "scaled_linear", "cosine", "sigmoid"]
"""diffusion.schedules.SCHEDULES."""
Process = Literal["gaussian", "uniform_mix"]
"""diffusion.objectives.PROCESSES."""
Prediction = Literal["eps", "x_0", "v"]
"""diffusion.objectives.PREDICTIONS."""
SamplerName = Literal["ddim", "ddpm", "dpmpp_2m", "heun", "mix"]
"""diffusion.samplers.SAMPLERS."""
FeatureNetName = Literal["classifier", "inception", "lite0", "pixels"]
"""evaluation.nets.FEATURE_NETS."""
Spacing = Literal["auto", "uniform", "quadratic", "karras"]
Variance = Literal["beta", "beta_tilde", "measured", "learned"]
SampleVariance = Literal["auto", Variance]


@dataclass(frozen=True)
class DataConfig:
    """The images to train on, and their order."""

    shards: str | None = None
    """Folder or s3:// URI of a data set made by jobs/prepare.py. Without it, `images` or `source` is prepared first."""
    images: str | None = None
    """Folder of images of any size; subfolders are classes. The images are first prepared at the net's size and
    channels in {run.storage}/data/."""
    source: str | None = None
    """A source that needs no download. Without `shards` it is prepared in {run.storage}/data/ first."""
    split: str = "train"
    """The split to train on."""
    window_rows: int = 8192
    """Images are shuffled inside windows of row groups that hold about this many rows."""
    horizontal_flip: bool = False
    """Mirror each image with probability 1/2 (drawn per micro-batch, as all noise is)."""
    stall_timeout_s: float = 120.0
    """The run stops after this many seconds without a batch, in addition to run.storage_timeout_s."""
    on_corrupt: Literal["error", "substitute"] = "error"
    """error: stop at an image that cannot be read. substitute: use another image of the same window, and list the
    unreadable one."""
    max_corrupt_share: float = 0.01
    """substitute: the run stops when a larger share of the split's images cannot be read."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule: beta_t over T steps."""

    kind: ScheduleKind = "linear"
    """Noise schedule: how beta_t grows over the steps."""
    num_timesteps: int = 1000
    """T, the number of noise levels."""
    beta_start: float = 1e-4
    """linear, scaled_linear: the first beta."""
    beta_end: float = 0.02
    """linear, scaled_linear: the last beta."""
    cosine_s: float = 0.008
    """cosine: the offset s near t = 0."""
    max_beta: float = 0.999
    """cosine, sigmoid: the largest beta allowed."""
    sigmoid_start: float = -3.0
    """sigmoid: where the logistic curve begins."""
    sigmoid_end: float = 3.0
    """sigmoid: where the logistic curve ends."""
    sigmoid_tau: float = 1.0
    """sigmoid: temperature of the logistic curve."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The forward process, and what the net predicts."""

    process: Process = "gaussian"
    """gaussian: DDPM. uniform_mix: the Hugging Face course's baseline (no timestep; the net predicts x_0)."""
    predict: Prediction = "eps"
    """What the net's output means (gaussian process)."""
    weight: Literal["simple", "min_snr"] = "simple"
    """Loss weight over t: 1, or min-SNR (Hang et al. 2023)."""
    min_snr_gamma: float = 5.0
    """min_snr: gamma, the SNR at which the weight is capped."""
    variance: Literal["fixed", "learned"] = "fixed"
    """learned: the net also predicts the variance of each pixel (Nichol & Dhariwal 2021)."""
    label_dropout: float = 0.1
    """Share of labels dropped, sample by sample, for classifier-free guidance (with model.num_classes > 0)."""


@dataclass(frozen=True)
class ModelConfig:
    """Fields of every net; NETS are the nets, and an installed package adds one in the group ddpm.nets."""

    module: ClassVar[str]
    """Where its `build` is, imported when a net is built: this module knows no PyTorch."""
    net: str
    """unet, dit, or a net of an installed package; together with --help-all it lists the flags of that net."""
    image_size: int = 32
    """Height and width of the images, in pixels."""
    channels: int = 3
    """Image channels."""
    num_classes: int = 0
    """0: unconditional. Otherwise the net is conditioned on a label in 0..num_classes-1."""
    dropout: float = 0.0
    """Dropout probability inside the blocks."""

    @property
    def num_dims(self) -> int:
        """D = C H W, the numbers of an image."""
        return self.channels * self.image_size**2


@dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """The U-Net."""

    module = "ddpm.models.unet"
    net: Literal["unet"] = "unet"
    base_width: int = 128
    """Width of the first resolution; each resolution has base_width * its multiplier."""
    width_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """One entry per resolution, finest first; each but the last halves the image."""
    blocks_per_resolution: int = 2
    """Residual blocks per resolution, on the way down."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Image sizes with self-attention."""
    attention_head_dim: int | None = None
    """Width of an attention head; None: one head."""
    middle_attention: bool = True
    """Self-attention in the middle block."""
    norm_groups: int = 32
    """Groups of group normalisation."""
    zero_init: bool = True
    """Initialise the output convolution and the second convolution of every residual block to zero."""


@dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """The diffusion Transformer."""

    module = "ddpm.models.dit"
    net: Literal["dit"] = "dit"
    patch_size: int = 2
    """Side of a patch; each patch is one token."""
    width: int = 128
    """Width of a token."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    mlp_ratio: int = 4
    """Width of the hidden layer of a block's MLP, as a multiple of width."""


NETS: dict[str, type[ModelConfig]] = {"unet": UNetConfig, "dit": DiTConfig}
NETS_GROUP = "ddpm.nets"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate over time, and the averaged weights."""

    lr: float = 2e-4
    """Learning rate after the warm-up."""
    lr_warmup_images: int = 0
    """Images over which the learning rate rises linearly from 0."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine to 0 at train.total_images."""
    beta_1: float = 0.9
    beta_2: float = 0.999
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    skip_non_finite: int = 0
    """Number of steps per run that may be skipped because the loss or the gradient is not finite."""
    ema_decay: float = 0.9999
    """Decay per step of the averaged weights, warmed up as min(ema_decay, (1 + step) / (10 + step))."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batches, precision, and the intervals of logs, checkpoints and samples."""

    total_images: int = 100_000_000
    """Training ends after this many images, rounded up to a global batch."""
    batch_size: int = 128
    """Global batch: images per optimizer step, over all workers."""
    micro_batch_size: int = 64
    """Images per micro-batch. Each worker takes complete micro-batches, so batch_size / micro_batch_size must be a
    multiple of the number of workers."""
    forward_images: int | None = None
    """Largest number of images per forward pass on a worker, a multiple of micro_batch_size; fewer need less memory.
    None: the worker's share of the batch in one pass. With model.dropout a pass is one micro-batch."""
    seed: int = 0
    """Seed of the initial weights, the order of images, and all noise."""
    init_from: str | None = None
    """A checkpoint or run of the same net: a new run starts with its averaged weights. None: random weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision inside the net (autocast). Noise, loss and weights are float32."""
    deterministic: bool = False
    """On a GPU, use only kernels that are bitwise reproducible; they are slower. On a CPU all kernels are."""
    compile: bool = False
    """torch.compile the net."""
    log_every_images: int = 12_800
    """Images between two points of the curves."""
    checkpoint_every_images: int = 256_000
    """Images between two checkpoints. MLflow gets metrics at this interval too: a checkpoint makes them final."""
    sample_every_images: int = 1_280_000
    """Images between two grids of samples."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints kept; the best one (lowest held-out loss) is kept as well."""
    held_out_images: int = 512
    """Held-out images whose loss (EMA weights, fixed noise and t) is measured at every checkpoint; 0: none."""


@dataclass(frozen=True)
class SampleConfig:
    """How images are sampled: grids during training, and the defaults of jobs/sample.py."""

    sampler: Literal["auto", SamplerName] = "auto"
    """ddpm: Algorithm 2. ddim: few steps. dpmpp_2m (DPM-Solver++), heun: second order, fewer steps.
    mix: for objective.process uniform_mix. auto: ddim or mix."""
    num_sample_steps: int | None = None
    """None: all T for ddpm, else 50."""
    spacing: Spacing = "auto"
    """Which timesteps the steps visit: evenly in t, in sqrt(t), or in sigma^(1/rho). auto: karras with
    dpmpp_2m and heun, else uniform."""
    rho: float = 7.0
    """karras: a larger rho takes more steps where little noise is left."""
    eta: float = 0.0
    """ddim, dpmpp_2m: 0 is deterministic, 1 as noisy as ddpm."""
    mean: Literal["clipped", "plain"] = "clipped"
    """ddpm: posterior mean from the clipped x_0_hat (clipped), or exactly Algorithm 2 (plain)."""
    variance: SampleVariance = "auto"
    """ddpm: sigma_t^2. measured: from the net's errors on training images (jobs/evaluate.py --variance measured).
    auto: learned where the net learned it, else beta_tilde."""
    clip_x_0: bool = True
    """All samplers but ddpm: clip x_0_hat to [-1, 1]."""
    dynamic_threshold: float | None = None
    """Instead of clipping, Imagen's dynamic thresholding at this quantile of |x_0_hat|, such as 0.995."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guidance only where sigma (with mix, the amount of noise) is in (low, high]. None: everywhere."""
    num_images: int = 64
    """Images in a grid."""
    seed: int = 0
    """Image i is a function of this seed and i."""


@dataclass(frozen=True)
class ClusterConfig:
    """How the run spreads over a Ray cluster."""

    num_workers: int | str = 1
    """A number, or least:most such as 1:4: the number shrinks when a node is lost and grows when one joins; the global
    batch stays the same."""
    gpu: bool | None = None
    """Workers use GPUs. None: they do if the cluster has any, and then too few GPUs are an error."""
    gpus_per_worker: float = 1.0
    """Below 1, workers of different runs share a GPU; those of one run cannot when they communicate by NCCL."""
    cpus_per_worker: float | None = None
    """CPUs per worker. None: 1, or less if reading tasks would otherwise be left without a CPU."""
    threads_per_worker: int | None = None
    """torch threads per worker. None: an equal share of the node's cores."""
    resize_interval_s: float = 30.0
    """least:most workers: seconds between checks whether more workers fit."""
    max_failures: int = 3
    """More failures than this in a row, without a checkpoint in between, end the run."""
    max_preemptions: int = 1000
    """More preempted nodes (spot instances) than this end the run; they do not count as failures."""

    def world_sizes(self) -> range:
        """All allowed numbers of workers.

        Raises:
            UserError: num_workers is neither a number nor least:most.
        """
        least, _, most = str(self.num_workers).partition(":")
        if least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least):
            return range(int(least), int(most or least) + 1)
        raise UserError(
            f"cluster.num_workers is {self.num_workers!r}; it must be at least 1, or least:most such as 1:4"
        )


@dataclass(frozen=True)
class RunConfig:
    """Name and storage of the run."""

    name: str | None = None
    """Folder under `storage`; the same name resumes the run. None: preset and time."""
    storage: str = field(default_factory=lambda: os.environ.get("DDPM_STORAGE") or "runs")
    """Folder or s3:// URI that holds runs. Default: DDPM_STORAGE from the environment, as on a cluster, else runs."""
    storage_timeout_s: float = 300.0
    """The run stops after S3 (or a disk) has failed or not answered for this many seconds."""
    shared_storage: bool = False
    """Declare that a local folder given as storage is shared by all nodes (NFS)."""
    experiment: str = "ddpm"
    """MLflow experiment."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=UNetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config tree as {"model.base_width": 128, ...}, in the order of the tree."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{f.name}."))
        else:
            flat[f"{prefix}{f.name}"] = value
    return flat


def override(config: T, values: Mapping[str, Any]) -> T:
    """A copy of `config` with dotted keys replaced: override(config, {"optim.lr": 1e-4}).

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return _made(type(config), tree, "config", config)


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], counts: Callable[[str], bool] = lambda key: True
) -> str:
    """The first differences between flat configs, such as "optim.lr 0.1 (now 0.2), ..."; empty: there are none."""
    changed = [key for key in {**now, **before} if before.get(key) != now.get(key) and counts(key)]
    listed = [f"{key} {before.get(key)} (now {now.get(key)})" for key in changed[:4]]
    return ", ".join(listed + ["..."] * (len(changed) > 4))


def to_json(config: Any) -> str:
    """`config` as indented JSON, the format of config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str | bytes, where: str = "config.json") -> Config:
    """The config that `to_json` wrote.

    Raises:
        UserError: not JSON, an unknown key, or a value of the wrong type; `where` names the file.
    """
    return _made(Config, strict_json.parse(dict[str, Any], text, where), where)


def merged(base: Config, text: str, where: str) -> Config:
    """`base` with the values in the JSON, a whole config.json or a part of one.

    Raises:
        UserError: as `from_json`.
    """
    return _made(Config, strict_json.parse(dict[str, Any], text, where), where, base)


def _made(cls: type[T], values: Mapping[str, Any], where: str, base: T | None = None) -> T:
    """A `cls` of nested values; what they do not say is as in `base`, else as the defaults are."""
    tree = _over({} if base is None else dataclasses.asdict(base), values)  # type: ignore[call-overload]
    if cls is not Config:
        return strict_json.parse(cls, json.dumps(tree), where)
    model, given = tree.pop("model", {}), values.get("model", {})
    made = strict_json.parse(Config, json.dumps(tree), where)
    kind: type[ModelConfig] = UNetConfig  # of a config.json without a name
    if isinstance(model, dict):
        kind = net_named(model.get("net", "unet"), f"{where}: model")
        if isinstance(base, Config) and type(base.model) is not kind:  # keeps what all nets have
            common = {f.name for f in dataclasses.fields(ModelConfig)}
            model = {key: value for key, value in model.items() if key in common or key in given}
    net = strict_json.parse(kind, json.dumps(model), f"{where}: model")
    return typing.cast(T, dataclasses.replace(made, model=net))


def _over(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with nested values replaced."""
    nested = {
        key: _over(base[key], value)
        for key, value in values.items()
        if isinstance(base.get(key), dict) and isinstance(value, Mapping)
    }
    return {**base, **values, **nested}


def net_named(name: Any, where: str) -> type[ModelConfig]:
    """The config class of a net: ours, or one that an installed package has entered.

    Raises:
        UserError: there is none of this name; `where` names what asked for it.
    """
    cls = NETS.get(name) or plugins.load(NETS_GROUP, name) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(map(repr, [*NETS, *plugins.names(NETS_GROUP)]))
        raise UserError(
            f"{where}: net is {reprlib.repr(name)}; it must be one of {known}, or a net of an installed package"
        )
    if not (isinstance(cls, type) and issubclass(cls, ModelConfig) and getattr(cls, "net", None) == name):
        raise UserError(
            f"{NETS_GROUP}: {name!r} must be a subclass of ddpm.config.ModelConfig with net = {name!r}"
        )
    return cls
