"""How fast a net is trained: our loop beside diffusers' recipe and lucidrains', on the same net and batch.

    python benchmarks/step.py [--case cifar] [--turns 5] [--profile] [--only ours]

What is timed is the whole of a training step, from a batch in memory: noise, forward, loss, backward, clipping,
AdamW, averaged weights, and whatever else the loop does between two batches. Ours is `loop.train` itself. diffusers'
is the step of its `train_unconditional.py`, lucidrains' that of its `Trainer`; their batches are float32 already.
Every contestant is a process of its own that waits for its turn, so that a machine that grows busy slows all of
them. The table goes to benchmarks/step.md (of another case to step-CASE.md), with --profile also where the time went.
"""

import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from ddpm.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, override
from ddpm.models.diffusers_names import diffusers_names
from ddpm.presets import PRESETS
from ddpm.training import loop
from ddpm.training.runtime import LocalRuntime, MicroBatch, NoTracker
from ddpm.training.state import build_net, parameter_count

NEVER = {"train.total_images": 10**12, "train.checkpoint_every_images": 0, "train.sample_every_images": 0}
REFERENCE = Config(  # a small sibling of Ho et al.'s net for CIFAR-10
    data=DataConfig(horizontal_flip=True),
    model=ModelConfig(base_width=64, width_multipliers=(1, 2, 2)),
    optim=OptimConfig(lr_warmup_images=1_600),
    train=TrainConfig(batch_size=16, micro_batch_size=16, log_every_images=1_600),
)
CASES = {"cifar": REFERENCE, **PRESETS}

OURS = {
    "ours, float32": {},
    "ours, bfloat16": {"train.precision": "bfloat16"},
    "ours, float32, compiled": {"train.compile": True},
    "ours, bfloat16, compiled": {"train.precision": "bfloat16", "train.compile": True},
}
DIFFUSERS = {
    "diffusers, float32 (its default)": {},
    "diffusers, float32, channels-last": {"channels_last": True},
    "diffusers, bfloat16": {"autocast": True},
    "diffusers, bfloat16, memory kept": {"autocast": True},
    "diffusers, bfloat16, channels-last": {"autocast": True, "channels_last": True},
    "diffusers, bfloat16, channels-last, compiled": {
        "autocast": True,
        "channels_last": True,
        "compiled": True,
    },
}
LUCIDRAINS = {"lucidrains, float32 (its default)": {}, "lucidrains, bfloat16": {"autocast": True}}
KEPT = "memory kept"
"""Ends the name of a peer that has our settings of the C library, which jobs/train.py makes for its workers."""
BASE = "diffusers, float32 (its default)"
BEFORE = "before: "
"""Begins the names of contestants whose code is that of another checkout."""


@dataclass(frozen=True)
class Arguments:
    """What to measure, and for how long."""

    case: Literal["cifar", "digits", "glyphs", "fashion-mnist", "cifar10", "celeba64"] = "cifar"
    """cifar: 64-128-128 channels, attention at 16, batches of 16. Else a preset's net and batch."""
    turns: int = 5
    """Of each contestant; the medians count."""
    turn_s: float = 4.0
    """How long a turn lasts, about."""
    only: str = ""
    """Contestants whose name contains this."""
    device: Literal["cpu", "cuda"] = "cpu"
    batch_size: int = 0
    """Images a step; 0: the case's."""
    image_size: int = 0
    """Pixels along an edge; 0: the case's."""
    profile: bool = False
    """Also say where the time of a step goes."""
    losses: int = 0
    """Instead: the losses of so many steps of ours, as evidence that a change changed nothing."""
    before: Path | None = None
    """Another checkout of this project: ours as it is there is a contestant, too."""
    contestant: str | None = None
    """Be this one, and take turns that are asked for on the standard input."""


# The contestants, each as a loop over batches


def train_ours(config: Config, batches: Iterator[MicroBatch]) -> None:
    class InMemory(LocalRuntime):
        def __init__(self) -> None:
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self.identity: dict[str, Any] = {}

        def batches(self, images_seen: int) -> Iterator[MicroBatch]:
            return batches

        def held_out(self) -> None:
            return None

        def latest_checkpoint(self) -> Any:
            return nullcontext(None)

        def facts(self) -> dict[str, float]:
            return {}

    class Printed(NoTracker):
        def metrics(self, values: dict[str, float], images_seen: int) -> None:
            say({"step": images_seen // config.train.batch_size, "loss": values["train/loss"]})

    loop.train(config, InMemory(), Printed())


def train_diffusers(
    config: Config,
    batches: Iterator[Tensor],
    autocast: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> None:
    """The step of diffusers' examples/unconditional_image_generation/train_unconditional.py."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    net = diffusers_net(config)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    model = torch.compile(net) if compiled else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    for x_0 in batches:
        if channels_last:
            x_0 = x_0.contiguous(memory_format=torch.channels_last)
        noise = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (len(x_0),), device=x_0.device)
        noisy = scheduler.add_noise(x_0, noise, t)
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=autocast):
            out = model(noisy, t).sample
        loss = F.mse_loss(out.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())


def train_lucidrains(config: Config, batches: Iterator[Tensor], autocast: bool = False) -> None:
    """The step of denoising-diffusion-pytorch's Trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = config.model.image_size
    model = GaussianDiffusion(lucidrains_net(config), image_size=size, objective="pred_noise").to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(model, beta=0.995, update_every=10)
    for x_0 in batches:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(x_0 * 0.5 + 0.5)  # it wants [0, 1]
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()


def diffusers_net(config: Config) -> nn.Module:
    """UNet2DModel with the sizes, and the first weights, of our net."""
    import diffusers

    model = config.model
    sizes = [model.image_size >> level for level in range(len(model.width_multipliers))]
    attention = ["Attn" if size in model.attention_resolutions else "" for size in sizes]
    net = diffusers.UNet2DModel(
        sample_size=model.image_size,
        in_channels=model.channels,
        out_channels=model.channels,
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=[f"{kind}DownBlock2D" for kind in attention],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(attention)],
        block_out_channels=[model.base_width * multiplier for multiplier in model.width_multipliers],
        layers_per_block=model.blocks_per_resolution,
        downsample_padding=0,
        dropout=model.dropout,
        attention_head_dim=model.attention_head_dim,
        norm_num_groups=model.norm_groups,
        norm_eps=1e-6,
        add_attention=model.middle_attention,
    )
    theirs, ours = net.state_dict(), build_net(config).state_dict()
    for our, names in diffusers_names(model).items():
        rows = [theirs[name].shape[0] for name in names]
        for name, weight in zip(names, ours[our].split(rows), strict=True):
            theirs[name] = weight
    net.load_state_dict(theirs)
    return net.to("cuda" if torch.cuda.is_available() else "cpu")


def lucidrains_net(config: Config) -> nn.Module:
    """Unet with the resolutions of our net, and the width that gives it about as many weights."""
    from denoising_diffusion_pytorch import Unet

    def net(width: int) -> nn.Module:
        return Unet(width, dim_mults=config.model.width_multipliers, channels=config.model.channels)

    wanted = parameter_count(build_net(config))
    return net(min(range(8, 256, 8), key=lambda width: abs(parameter_count(net(width)) - wanted)))


def difference(config: Config) -> float:
    """How far our net's output is from diffusers', at the most; outputs are about 1."""
    config = override(config, {"model.zero_init": False, "model.dropout": 0.0})
    ours, theirs = build_net(config), diffusers_net(config).cpu()
    x_t, t = next(float_batches(config, iter([None]), "cpu")), torch.arange(config.train.micro_batch_size)
    with torch.no_grad():
        return (ours(x_t, t) - theirs(x_t, t * ours.time_scale).sample).abs().max().item()


# Turns


def say(values: dict[str, Any]) -> None:
    print("SAID " + json.dumps(values), flush=True)


def turns(batches_per_step: int) -> Iterator[None]:
    """One item for each batch of the steps that are asked for on the standard input: "3", or "3 profile"."""
    for line in sys.stdin:
        steps, *profiled = line.split()
        profiler = torch.profiler.profile() if profiled else nullcontext()
        begin = time.perf_counter()
        with profiler:
            for _ in range(int(steps) * batches_per_step):
                yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        said: dict[str, Any] = {"seconds": time.perf_counter() - begin}
        if profiled:
            said["operators"] = {
                event.key: max(event.self_cpu_time_total, event.self_device_time_total) / 1e3 / int(steps)
                for event in profiler.key_averages()
            }
        say(said)


def pictures(config: Config) -> np.ndarray:
    """scikit-learn's digits, enlarged: uint8 [N, H, W, C]."""
    from sklearn.datasets import load_digits

    size, channels = config.model.image_size, config.model.channels
    grey = torch.from_numpy(load_digits().images).float()[:, None] * (255 / 16)
    grey = F.interpolate(grey, (size, size), mode="bilinear").round().to(torch.uint8)
    return grey.expand(-1, channels, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def micro_batches(config: Config, turns: Iterator[None]) -> Iterator[MicroBatch]:
    image, size = pictures(config), config.train.micro_batch_size
    image, label = torch.tensor(image), torch.zeros(size, dtype=torch.int64)
    for i, _ in enumerate(turns):
        rows = torch.arange(i * size, (i + 1) * size) % len(image)
        yield MicroBatch(i % (config.train.batch_size // size), image[rows], label)


def float_batches(config: Config, turns: Iterator[None], device: str) -> Iterator[Tensor]:
    image, size = torch.tensor(pictures(config)), config.train.micro_batch_size
    x_0 = (image.permute(0, 3, 1, 2) / 127.5 - 1).contiguous().to(device)
    for i, _ in enumerate(turns):
        yield x_0[torch.arange(i * size, (i + 1) * size, device=device) % len(x_0)]


def grown(arguments: Arguments) -> Config:
    """The case, with batch and image as large as asked for; attention stays at half the image or at 16x16."""
    config = CASES[arguments.case]
    if arguments.batch_size:
        grain = arguments.batch_size
        train = dataclasses.replace(config.train, batch_size=grain, micro_batch_size=grain)
        config = dataclasses.replace(config, train=train)
    if arguments.image_size:
        size, attention = arguments.image_size, (min(16, arguments.image_size // 2),)
        model = dataclasses.replace(config.model, image_size=size, attention_resolutions=attention)
        config = dataclasses.replace(config, model=model)
    return config


def contend(arguments: Arguments) -> None:
    """Be a contestant, until the standard input ends."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    name = (arguments.contestant or "").removeprefix(BEFORE)
    config = override(grown(arguments), NEVER)
    if name in OURS:
        values = dict(OURS[name])
        if arguments.losses:
            values["train.log_every_images"] = 10 * config.train.batch_size
        config = override(config, values)
        share = config.train.batch_size // config.train.micro_batch_size
        train_ours(config, micro_batches(config, turns(share)))
        return
    # Peers take the batch whole.
    train = dataclasses.replace(config.train, micro_batch_size=config.train.batch_size)
    config = dataclasses.replace(config, train=train)
    batches = float_batches(config, turns(1), arguments.device)
    if name in DIFFUSERS:
        train_diffusers(config, batches, **DIFFUSERS[name])
    else:
        train_lucidrains(config, batches, **LUCIDRAINS[name])


class Contestant:
    """A process that trains when it is told to.

    Args:
        name: one of OURS, DIFFUSERS, LUCIDRAINS, or BEFORE and one of OURS.
    """

    def __init__(self, arguments: Arguments, name: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--contestant", name, "--case", arguments.case]
        command += ["--device", arguments.device, "--losses", str(arguments.losses)]
        command += ["--batch-size", str(arguments.batch_size), "--image-size", str(arguments.image_size)]
        cache = str(folder / f"compiled-{abs(hash(name))}")
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache, **os.environ}
        from ddpm.connection import KEPT_MEMORY  # not at the top: an earlier checkout has none

        if name in OURS or name.endswith(KEPT):
            environment |= KEPT_MEMORY
        if name.startswith(BEFORE):
            environment["PYTHONPATH"] = f"{arguments.before}:{environment.get('PYTHONPATH', '')}"
        if arguments.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.errors = folder / f"{name}.err"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        self.losses: dict[int, float] = {}

    def turn(self, steps: int, profile: bool = False) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{steps}{' profile' * profile}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("SAID "):
                said = json.loads(line.removeprefix("SAID "))
                if "seconds" in said:
                    return said
                self.losses[said["step"]] = said["loss"]
        raise RuntimeError(self.errors.read_text())

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


# What came out


def peak(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two matrices of 2048 (on a GPU 8192) rows and columns."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)

    def once() -> float:
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return 2 * n**3 / min(once() for _ in range(10)) / 1e9


def gigaflops(config: Config) -> float:
    """Of an image, forward and backward: the products of matrices, and the convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    net = build_net(config)
    x_t = torch.zeros(1, config.model.channels, config.model.image_size, config.model.image_size)
    with FlopCounterMode(display=False) as counter:
        net(x_t, torch.zeros(1, dtype=torch.int64)).sum().backward()
    return counter.get_total_flops() / 1e9


KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("convolution, backward", ("convolution_backward",)),
    ("convolution", ("convolution", "conv2d")),
    ("torch's group norm, backward", ("group_norm_backward",)),
    ("torch's group norm", ("group_norm",)),
    ("SiLU", ("silu",)),
    ("attention", ("attention", "softmax", "bmm")),
    ("linear layers", ("mm", "linear")),
    ("AdamW", ("adam",)),
    ("averaged weights", ("lerp",)),
    ("copies, casts, concatenation", ("copy_", "clone", "_to_copy", "aten::to", "contiguous", "aten::cat")),
    ("sums and products (our group norm)", ("add", "sum", "mul", "div", "sub", "mean", "square", "rsqrt")),
)
OTHER = "other (compiled: what is fused)"


def by_kind(operators: dict[str, float]) -> dict[str, float]:
    """Milliseconds a step by kind of operator, the largest first."""
    found: dict[str, float] = defaultdict(float)
    for name, ms in operators.items():
        kind = next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), OTHER)
        found[kind] += ms
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.contestant:
        contend(arguments)
        return
    before = [BEFORE + name for name in OURS if arguments.before and "compiled" not in name]
    peers = () if arguments.losses else (*DIFFUSERS, *LUCIDRAINS)
    names = [name for name in (*peers, *before, *OURS) if arguments.only in name]
    with tempfile.TemporaryDirectory() as folder:
        contestants = {name: Contestant(arguments, name, Path(folder)) for name in names}
        try:
            if arguments.losses:
                tell_losses(arguments, contestants)
            else:
                measure(arguments, contestants)
        finally:
            for contestant in contestants.values():
                contestant.end()


def tell_losses(arguments: Arguments, contestants: dict[str, Contestant]) -> None:
    for name, contestant in contestants.items():
        contestant.turn(arguments.losses)
        contestant.turn(1)  # what it says of the last step comes before what it says of this one
        losses = ", ".join(f"{loss:.6f}" for step, loss in contestant.losses.items())
        print(f"{arguments.case}: {name}: {losses}", flush=True)


def measure(arguments: Arguments, contestants: dict[str, Contestant]) -> None:
    config = grown(arguments)
    batch = config.train.batch_size
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    start, steps, speed = {}, {}, defaultdict(list)
    for name, contestant in contestants.items():
        begin = time.perf_counter()
        contestant.turn(1)
        start[name] = time.perf_counter() - begin
        steps[name] = max(1, round(arguments.turn_s / contestant.turn(2)["seconds"] * 2))
    peaks: dict[torch.dtype, float] = {torch.float32: 0, torch.bfloat16: 0}
    for _ in range(arguments.turns):
        for dtype in peaks:
            peaks[dtype] = max(peaks[dtype], peak(arguments.device, dtype))
        for name, contestant in contestants.items():
            speed[name].append(steps[name] * batch / contestant.turn(steps[name])["seconds"])
            print(f"{name}: {speed[name][-1]:.2f} images/s", flush=True)
    profiles = {}
    if arguments.profile:
        profiles = {name: by_kind(c.turn(3, profile=True)["operators"]) for name, c in contestants.items()}
    write(arguments, config, start, speed, peaks, profiles)


def write(
    arguments: Arguments,
    config: Config,
    start: dict[str, float],
    speed: dict[str, list[float]],
    peaks: dict[torch.dtype, float],
    profiles: dict[str, dict[str, float]],
) -> None:
    """The tables, as Markdown."""
    import diffusers
    from runtime import processor, write_table  # not at the top: it is of this checkout

    median = {name: statistics.median(found) for name, found in speed.items()}
    peers = {name: found for name, found in median.items() if name in DIFFUSERS}
    best = max(peers, key=peers.__getitem__, default=next(iter(median)))
    base = BASE if BASE in median else best
    flops = gigaflops(config)
    net = build_net(config)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    lines = [
        "# How fast a net is trained",
        "",
        f"Case {arguments.case}: {config.model.image_size}x{config.model.image_size} images, "
        f"{parameter_count(net) / 1e6:.2f} M weights, {flops:.2f} GFLOP an image forward and "
        f"backward, batches of {config.train.batch_size}. Images/s of whole steps, medians of {arguments.turns} turns "
        f"(`python benchmarks/step.py --case {arguments.case}`); ratios of turns side by side, their medians. "
        f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} cores of {where}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}; a product of large matrices reaches {peaks[torch.float32]:.0f} GFLOP/s in "
        f"float32 and {peaks[torch.bfloat16]:.0f} in bfloat16. Outputs of our net and diffusers' differ by "
        f"{difference(config):.1e} at the most.",
        "",
        "| contestant | images/s | of the bfloat16 peak | diffusers' default | diffusers' best | first step, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in speed.items():
        ratios = [
            statistics.median(a / b for a, b in zip(found, speed[other], strict=True))
            for other in (base, best)
        ]
        share = "" if name in LUCIDRAINS else f"{median[name] * flops / peaks[torch.bfloat16]:.0%}"
        lines.append(
            f"| {name} | {median[name]:.2f} | {share} | {ratios[0]:.2f} | {ratios[1]:.2f} | {start[name]:.1f} |"
        )
    if profiles:
        kinds = list(dict.fromkeys(kind for profile in profiles.values() for kind in profile))
        names = list(profiles)
        lines += ["", "Where the time of a step goes, ms:", "", "| operator | " + " | ".join(names) + " |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for kind in kinds:
            lines.append(
                f"| {kind} | " + " | ".join(f"{profiles[name].get(kind, 0):.1f}" for name in names) + " |"
            )
    script = Path(__file__)
    if arguments.case != "cifar":
        script = script.with_stem(f"step-{arguments.case}")
    write_table(str(script), lines)


if __name__ == "__main__":
    main()
