"""The configuration of a run, as one tree of frozen dataclasses.

The tree is the command line (tyro), the MLflow parameters and the `config.json` of a checkpoint (json.py).
Sampling and evaluation rebuild the net from that file alone.
"""

import dataclasses
import enum
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, Len

from ddpm.config.kinds import AUTO, Choice
from ddpm.utils.errors import UserError

SamplerName = Annotated[str, Choice("sample.sampler")]
Spacing = Annotated[str, Choice("sample.spacing", also=(AUTO,))]
FeatureNetName = Annotated[str, Choice("features")]
Variance = Literal["beta", "beta_tilde", "learned"]
"""The variance of the noise that a step of the sampler ddpm adds."""
SampleVariance = Literal["auto", Variance]
BoundVariance = Literal["auto", "beta", "beta_tilde", "measured", "learned"]
"""The variance of p(x_{t-1} | x_t) in bits/dim."""

# Ranges of fields: `check_values` checks a command line, `from_json` a file. Larger numbers than these are of no use,
# and would take all memory or time.
NonEmptyStr = Annotated[str, Len(1)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Interval(ge=1, le=10**6)]
NonNegativeInt = Annotated[int, Interval(ge=0, le=10**6)]
UpTo4096 = Annotated[int, Interval(ge=1, le=4096)]
Port = Annotated[int, Interval(ge=0, le=65535)]
NumImages = Annotated[int, Interval(ge=1, le=10**11)]
NumImagesOrZero = Annotated[int, Interval(ge=0, le=10**11)]
NumScoredImages = Annotated[int, Interval(ge=20, le=10**6)]
"""At least evaluation.feature_scores.LEAST_IMAGES."""
Seconds = Annotated[float, Interval(gt=0, le=10**9)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
ShareAboveZero = Annotated[float, Interval(gt=0, le=1)]
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]
Beta = Annotated[float, Interval(gt=0, lt=1)]


class Affects(enum.Flag):
    """What a key affects: metadata of its field, else `affects` of its class. NOTHING: where a run is."""

    NOTHING = 0
    EXECUTION = enum.auto()
    """How a run is carried out: its length, its speed, what it stores. A resumed run may change it."""
    ORDER = enum.auto()
    """The images of each step."""
    NOISE = enum.auto()
    """Noise, and the loss."""
    NET = enum.auto()
    """What weights mean: another value needs other weights."""
    LEARNING = enum.auto()
    """The values of the weights in any other way."""
    SAMPLING = enum.auto()
    """Images sampled from given weights."""
    TASK = enum.auto()
    """What runs must share to be comparable."""
    LOCATION = enum.auto()
    """Where data is stored; its fingerprint identifies it."""
    WEIGHTS = ORDER | NOISE | NET | LEARNING
    ANYTHING = EXECUTION | WEIGHTS | SAMPLING | LOCATION


MEANING = Affects.NOISE | Affects.NET | Affects.SAMPLING
"""What the net's input and output mean."""


@dataclass(frozen=True)
class DataConfig:
    """The images to train on, and their order."""

    affects: ClassVar = Affects.ORDER
    shards: Annotated[NonEmptyStr | None, Affects.LOCATION] = None
    """Folder or s3:// URI of a data set made by ddpm prepare. Without it, `images` or `source` is prepared first."""
    images: NonEmptyStr | None = None
    """Folder of images of any size; subfolders are classes. The images are first prepared at the net's size and
    channels in {run.storage}/data/."""
    source: Annotated[NonEmptyStr | None, Affects.EXECUTION] = None
    """A source that needs no download. Without `shards` it is prepared in {run.storage}/data/ first."""
    split: NonEmptyStr = "train"
    """The split to train on."""
    window_rows: NumImages = 8192
    """Images are shuffled inside windows of row groups that hold about this many rows."""
    horizontal_flip: Annotated[bool, Affects.NOISE | Affects.TASK] = False
    """Mirror each image with probability 1/2 (drawn per micro-batch, as all noise is)."""
    augment: Annotated[Share, Affects.NOISE] = 0.0
    """Augmentation for few images: flip, scale, rotate and shift, each with this probability. The net is conditioned on
    it, and samples are not augmented (Karras et al. 2022, Appendix F.2)."""
    autoencoder: Annotated[NonEmptyStr | None, Affects.EXECUTION] = None
    """KIND:WEIGHTS, such as diffusers:FOLDER: `images` or `source`, prepared at `image_size`, is encoded in
    {run.storage}/data/, and the net sees latents."""
    image_size: Annotated[UpTo4096 | None, Affects.ORDER] = None
    """Side of the images that an autoencoder encodes; model.image_size is the side of what the net sees."""
    latents: Annotated[NonEmptyStr | None, Affects.NET | Affects.TASK] = None
    """Digest of the autoencoder of latents, which the data set says; None: the net sees images."""
    x_0_max: Annotated[PositiveFloat, MEANING] = 1.0
    """The largest value of x_0 for the net: x_0 = x_0_max (stored / 127.5 - 1). 1 for images; a set of latents says its
    own, with which latents have a standard deviation of 0.5."""
    stall_timeout_s: Annotated[Seconds, Affects.NOTHING] = 120.0
    """The run stops after this many seconds without a batch, in addition to run.storage_timeout_s."""
    skip_unreadable: Annotated[bool, Affects.EXECUTION] = False
    """When `images` or `source` is prepared, leave out images that cannot be read (5 % of them at most), and list them
    in unreadable.txt beside the shards."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule: beta_t over T steps."""

    affects: ClassVar = Affects.NOISE | Affects.SAMPLING
    kind: Annotated[str, Choice("schedule.kind")] = "linear"
    """Noise schedule: how beta_t grows over the steps. straight: the path of flow matching. geometric: EDM's noise."""
    num_timesteps: PositiveInt = 1000
    """T, the number of noise levels."""
    beta_start: Beta = 1e-4
    """linear, scaled_linear: the first beta."""
    beta_end: Beta = 0.02
    """linear, scaled_linear: the last beta."""
    cosine_s: Share = 0.008
    """cosine: the offset s near t = 0."""
    max_beta: Beta = 0.999
    """cosine, sigmoid, straight: the largest beta allowed."""
    sigmoid_start: float = -3.0
    """sigmoid: where the logistic curve begins."""
    sigmoid_end: float = 3.0
    """sigmoid: where the logistic curve ends."""
    sigmoid_tau: PositiveFloat = 1.0
    """sigmoid: temperature of the logistic curve."""
    sigma_min: PositiveFloat = 0.002
    """geometric: the first sigma."""
    sigma_max: PositiveFloat = 80.0
    """geometric: the last sigma."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The forward process, and what the net predicts."""

    affects: ClassVar = Affects.NOISE
    process: Annotated[str, Choice("objective.process"), Affects.NOISE | Affects.SAMPLING | Affects.TASK] = (
        "gaussian"
    )
    """gaussian: DDPM. uniform_mix: the Hugging Face course's baseline (no timestep; the net predicts x_0)."""
    predict: Annotated[str, Choice("objective.predict"), MEANING] = "eps"
    """What the net's output means (gaussian process). edm: F of EDM (Karras et al. 2022), whose input is scaled, too.
    flow: the velocity eps - x_0 of flow matching; both have their own papers' loss with the weight simple."""
    sigma_data: Annotated[PositiveFloat, MEANING] = 0.5
    """edm: the standard deviation of the images, in [-1, 1]."""
    weight: Annotated[str, Choice("objective.weight")] = "simple"
    """Loss weight over t. simple: 1. min_snr: Hang et al. 2023. edm, flow: the weight of that prediction's own loss."""
    min_snr_gamma: PositiveFloat = 5.0
    """min_snr: gamma, the SNR at which the weight is capped."""
    timesteps: Annotated[str, Choice("objective.timesteps")] = "uniform"
    """How t is drawn in training. log_normal: sigma is log-normal, as in EDM. logit_normal: t of the straight path is
    logit-normal (Esser et al. 2024), which is a log-normal sigma with another mean and deviation."""
    log_sigma_mean: Annotated[float, Interval(ge=-20, le=20)] | None = None
    """Mean of log sigma. None: -1.2 for log_normal, 0 for logit_normal."""
    log_sigma_std: PositiveFloat | None = None
    """Standard deviation of log sigma. None: 1.2 for log_normal, 1 for logit_normal."""
    variance: Annotated[Literal["fixed", "learned"], MEANING] = "fixed"
    """learned: the net also predicts the variance of each pixel (Nichol & Dhariwal 2021)."""
    label_dropout: Share = 0.1
    """Share of labels dropped, sample by sample, for classifier-free guidance (with model.num_classes > 0)."""


@dataclass(frozen=True)
class ModelConfig:
    """Fields of every net."""

    affects: ClassVar = Affects.NET
    module: ClassVar[str]
    """Where its `build` is, imported when a net is built: this module knows no PyTorch."""
    net: str
    """unet, or a net of an installed package; together with --help-all it lists the flags of that net."""
    image_size: Annotated[UpTo4096, Affects.NET | Affects.TASK] = 32
    """Height and width of what the net sees: pixels, or latents."""
    channels: Annotated[UpTo4096, Affects.NET | Affects.TASK] = 3
    """Image channels."""
    num_classes: NonNegativeInt = 0
    """0: unconditional. Otherwise the net is conditioned on a label in 0..num_classes-1."""
    dropout: Annotated[ShareBelowOne, Affects.LEARNING] = 0.0
    """Dropout probability inside the blocks."""

    @property
    def num_dims(self) -> int:
        """D = C H W, the numbers of an image."""
        return self.channels * self.image_size**2


@dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """The U-Net."""

    module = "ddpm.models.unet"
    net: Annotated[Literal["unet"], Choice("model.net")] = "unet"
    base_width: PositiveInt = 128
    """Width of the first resolution; each resolution has base_width * its multiplier."""
    width_multipliers: Annotated[tuple[PositiveInt, ...], Len(1)] = (1, 2, 2, 2)
    """One entry per resolution, finest first; each but the last halves the image."""
    blocks_per_resolution: PositiveInt = 2
    """Residual blocks per resolution, on the way down."""
    attention_resolutions: tuple[UpTo4096, ...] = (16,)
    """Image sizes with self-attention."""
    attention_head_dim: PositiveInt | None = None
    """Width of an attention head; None: one head."""
    middle_attention: bool = True
    """Self-attention in the middle block."""
    norm_groups: PositiveInt = 32
    """Groups of group normalisation."""
    zero_init: Annotated[bool, Affects.LEARNING] = True
    """Initialise the output convolution and the second convolution of every residual block to zero."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its learning rate over time, and the averaged weights."""

    affects: ClassVar = Affects.LEARNING
    kind: Literal["adamw", "muon"] = "adamw"
    """muon: convolutions and linear layers by Muon (Jordan et al. 2024), all other weights by AdamW."""
    lr: PositiveFloat = 2e-4
    """Learning rate after the warm-up."""
    lr_warmup_images: NumImagesOrZero = 0
    """Images over which the learning rate rises linearly from 0."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine to 0 at train.total_images."""
    beta_1: ShareBelowOne = 0.9
    beta_2: ShareBelowOne = 0.999
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    skip_non_finite: Annotated[NonNegativeInt, Affects.EXECUTION] = 0
    """Number of steps per run that may be skipped because the loss or the gradient is not finite."""
    ema_decay: ShareBelowOne = 0.9999
    """Decay per step of the averaged weights, warmed up as min(ema_decay, (1 + step) / (10 + step))."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batches, precision, and the intervals of logs, checkpoints and samples."""

    affects: ClassVar = Affects.EXECUTION
    total_images: NumImages = 100_000_000
    """Training ends after this many images, rounded up to a global batch."""
    batch_size: Annotated[PositiveInt, Affects.ORDER | Affects.NOISE] = 128
    """Global batch: images per optimizer step, over all workers."""
    micro_batch_size: Annotated[PositiveInt, Affects.ORDER | Affects.NOISE] = 64
    """Images per micro-batch. Workers take whole micro-batches, so there are at most batch_size / micro_batch_size."""
    forward_images: PositiveInt | None = None
    """Largest number of images per forward pass on a worker; fewer need less memory. None: the worker's share of the
    batch in one pass. On a GPU whose memory that exceeds, passes are halved until they fit."""
    seed: Annotated[Seed, Affects.ORDER | Affects.NOISE | Affects.TASK] = 0
    """Seed of the initial weights, the order of images, and all noise."""
    init_from: Annotated[NonEmptyStr | None, Affects.EXECUTION | Affects.TASK] = None
    """A checkpoint or run of the same net: a new run starts with its averaged weights. None: random weights."""
    precision: Annotated[Literal["float32", "bfloat16"], Affects.LEARNING | Affects.SAMPLING] = "float32"
    """Precision inside the net (autocast). Noise, loss and weights are float32. bfloat16: float32 on a device without
    instructions for it, such as a CPU without AVX-512, where it would take several times as long."""
    deterministic: bool = False
    """On a GPU, use only kernels that are bitwise reproducible; they are slower. On a CPU all kernels are."""
    compile: bool | None = False
    """Compile the net's blocks (torch.compile) in the first step. None: on an accelerator, if there is a C compiler."""
    log_every_images: NumImagesOrZero = 12_800
    """Images between two points of the curves; 0: a point at the end."""
    checkpoint_every_images: NumImagesOrZero = 256_000
    """Images between two checkpoints; 0: one at the end. MLflow gets metrics at this interval too: a checkpoint makes
    them final."""
    sample_every_images: NumImagesOrZero = 1_280_000
    """Images between two grids of samples; 0: one at the end."""
    keep_checkpoints: PositiveInt = 3
    """Number of newest checkpoints kept; the best one (lowest held-out loss) is kept as well."""
    held_out_images: Annotated[NumImagesOrZero, Affects.LEARNING | Affects.TASK] = 512
    """Held-out images whose loss (EMA weights, fixed noise and t) is measured at every checkpoint; 0: none."""


@dataclass(frozen=True)
class SampleConfig:
    """How images are sampled: grids during training, and the defaults of later sampling."""

    affects: ClassVar = Affects.SAMPLING
    sampler: Annotated[str, Choice("sample.sampler", also=(AUTO,))] = AUTO
    """ddpm: Algorithm 2. ddim: few steps. dpmpp_2m (DPM-Solver++), heun: second order, fewer steps.
    mix: for uniform_mix. auto: the first that fits the process, ddim or mix."""
    num_sample_steps: PositiveInt | None = None
    """None: all T for ddpm, else 50."""
    spacing: Spacing = AUTO
    """Which timesteps the steps visit: evenly in t, in sqrt(t), or in sigma^(1/rho). auto: karras with
    dpmpp_2m and heun, else uniform."""
    rho: Annotated[float, Ge(1)] = 7.0
    """karras: a larger rho takes more steps where little noise is left."""
    sigma_min: NonNegativeFloat = 0.0
    """karras: sigma of the last step; 0: the schedule's smallest. 0.08 is ten of 256 grey levels."""
    eta: Share = 0.0
    """ddim, dpmpp_2m: 0 is deterministic, 1 as noisy as ddpm."""
    mean: Literal["clipped", "plain"] = "clipped"
    """ddpm: posterior mean from the clipped x_0_hat (clipped), or exactly Algorithm 2 (plain)."""
    variance: SampleVariance = "auto"
    """ddpm: sigma_t^2. auto: learned where the net learned it, else beta_tilde."""
    clip_x_0: bool = True
    """All samplers but ddpm: clip x_0_hat to the range of images."""
    guidance_scale: NonNegativeFloat = 1.0
    """Nets with classes: classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guidance only where sigma (with mix, the amount of noise) is in (low, high]. None: everywhere."""
    num_images: Annotated[UpTo4096, Affects.EXECUTION] = 64
    """Images in a grid."""
    seed: Seed = 0
    """Image i is a function of this seed and i."""


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """Flags of commands that change the sampling of a trained net; None: as in training."""

    spacing: Spacing | None = None
    """Which timesteps the steps visit: evenly in t, in sqrt(t), or in sigma^(1/7). auto: the sampler's default."""
    sigma_min: NonNegativeFloat | None = None
    """karras: sigma of the last step; 0: the schedule's smallest."""
    eta: Share | None = None
    """ddim, dpmpp_2m: 0 is deterministic, 1 is as noisy as ddpm."""
    variance: Variance | None = None
    """ddpm: variance of the noise that a step adds."""
    guidance_scale: NonNegativeFloat | None = None
    """Nets with classes: classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Nets with classes: guidance only where sigma is in (low, high]."""

    def changed(self, sample: SampleConfig, **more: Any) -> SampleConfig:
        """`sample` with these settings and `more`, where they are not None."""
        changes = {field.name: getattr(self, field.name) for field in dataclasses.fields(SampleFlags)} | more
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(sample, **given)


@dataclass(frozen=True)
class ClusterConfig:
    """How the run spreads over a Ray cluster."""

    affects: ClassVar = Affects.NOTHING
    num_workers: Annotated[int | str, Affects.EXECUTION] = AUTO
    """A number, or least:most such as 1:4, which follows the nodes; the global batch stays the same. auto: as the run
    began; at first one for each GPU, else CPU, as many as share the micro-batches evenly."""
    gpu: bool | None = None
    """Workers use GPUs. None: if the cluster has any; too few are then an error."""
    gpus_per_worker: ShareAboveZero = 1.0
    """Below 1, workers of different runs share a GPU; those of one run cannot when they communicate by NCCL."""
    cpus_per_worker: PositiveFloat | None = None
    """CPUs per worker. None: 1, or less if reading tasks would otherwise be left without a CPU."""
    threads_per_worker: UpTo4096 | None = None
    """torch threads per worker on CPUs. None: as the run began; at its beginning 1 with auto workers, else an equal
    share of the cores."""
    resize_interval_s: Seconds = 30.0
    """least:most workers: seconds between checks whether more workers fit."""
    max_failures: NonNegativeInt = 3
    """More failures than this in a row, without a checkpoint in between, end the run."""
    max_preemptions: NonNegativeInt = 1000
    """More preempted nodes (spot instances) than this end the run; they do not count as failures."""

    def world_sizes(self) -> range:
        """All allowed numbers of workers; 1 for auto, which cluster/resources.py replaces."""
        if self.num_workers == AUTO:
            return range(1, 2)
        least, _, most = str(self.num_workers).partition(":")
        if least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least):
            return range(int(least), int(most or least) + 1)
        raise UserError(
            f"cluster.num_workers is {self.num_workers!r}; it must be at least 1, least:most such as 1:4, or auto"
        )


@dataclass(frozen=True)
class RunConfig:
    """Name and storage of the run."""

    affects: ClassVar = Affects.NOTHING
    name: NonEmptyStr | None = None
    """Folder under `storage`. None: the preset, and a hash of what differs from it."""
    storage: NonEmptyStr = field(default_factory=lambda: os.environ.get("DDPM_STORAGE") or "runs")
    """Folder or s3:// URI that holds runs. Default: DDPM_STORAGE from the environment, as on a cluster, else runs."""
    storage_timeout_s: Seconds = 300.0
    """The run stops after S3 (or a disk) has failed or not answered for this many seconds."""
    shared_storage: bool = False
    """Declare that a local folder given as storage is shared by all nodes (NFS)."""
    tracking: Literal["mlflow", "none"] = "mlflow"
    """mlflow: send the run to MLflow while it trains. none: MLflow is not used; ddpm sync can send the run later."""
    experiment: NonEmptyStr = "ddpm"
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
