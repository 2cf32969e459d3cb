"""The contestants of benchmarks/step.py, each as a loop over batches that are made on request.

    python benchmarks/peers/step.py "ours, bfloat16" --case cifar      # then "3" or "3 profile" on the input

It runs in the contestants' processes; benchmarks/step.py schedules the turns. diffusers' is the step of its
`train_unconditional.py`, lucidrains' that of its `Trainer`; their batches are float32 already.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from ddpm.build import build_net
from ddpm.config.json import override
from ddpm.config.presets import PRESETS
from ddpm.config.tree import Config, DataConfig, OptimConfig, TrainConfig, UNetConfig
from ddpm.data.reading import MicroBatch
from ddpm.training import loop
from ddpm.training.runtime import Runtime
from ddpm.training.state import parameter_count
from ddpm.training.transfers import LateFlags
from ddpm.utils.progress import Progress

NEVER = {"train.total_images": 10**11, "train.checkpoint_every_images": 0, "train.sample_every_images": 0}
REFERENCE = Config(  # a small sibling of Ho et al.'s net for CIFAR-10
    data=DataConfig(horizontal_flip=True),
    model=UNetConfig(base_width=64, width_multipliers=(1, 2, 2)),
    optim=OptimConfig(lr_warmup_images=1_600),
    train=TrainConfig(batch_size=16, micro_batch_size=16, log_every_images=1_600),
)
CASES = {"cifar": REFERENCE, **PRESETS}

OURS = {
    "ours, float32": {"train.precision": "float32", "train.compile": False},
    "ours, bfloat16": {"train.precision": "bfloat16", "train.compile": False},
    "ours, float32, compiled": {"train.precision": "float32", "train.compile": True},
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
LUCIDRAINS = {
    "lucidrains, float32 (its default)": {},
    "lucidrains, bfloat16": {"autocast": True},
    "lucidrains, bfloat16, compiled": {"autocast": True, "compiled": True},
}
BEFORE = "before: "
"""Prefix of contestants that run the code of another checkout."""


CaseName = Literal["cifar", "digits", "fashion-mnist", "cifar10", "celeba64"]


@dataclass(frozen=True)
class Case:
    """The net, batch and images that all contestants train."""

    case: CaseName = "cifar"
    """cifar: 64-128-128 channels, attention at 16, batches of 16. Else a preset's net and batch."""
    batch_size: int = 0
    """Images a step; 0: the case's."""
    image_size: int = 0
    """Pixels along an edge; 0: the case's."""
    device: Literal["cpu", "cuda"] = "cpu"

    def config(self) -> Config:
        """The config of the case; attention is at half the image size, or at 16x16."""
        batch = self.batch_size
        size = self.image_size
        values = dict[str, Any]()
        if batch:
            values |= {"train.batch_size": batch, "train.micro_batch_size": batch}
        if size:
            values |= {"model.image_size": size, "model.attention_resolutions": (min(16, size // 2),)}
        return override(CASES[self.case], values)

    def flags(self) -> list[str]:
        """The flags that describe this case."""
        names = [field.name for field in dataclasses.fields(Case)]
        return [word for name in names for word in ("--" + name.replace("_", "-"), str(getattr(self, name)))]


@dataclass(frozen=True)
class Arguments(Case):
    """The contestant to run."""

    name: tyro.conf.Positional[str] = ""
    log_every_steps: int = 0
    """Steps between two reports of the loss; 0: as in the case."""


def installed_peers() -> list[str]:
    """Peers whose packages are installed; the extra `benchmarks` has them."""
    peers = {"diffusers": DIFFUSERS, "denoising_diffusion_pytorch": LUCIDRAINS}
    return [name for package, names in peers.items() if find_spec(package) for name in names]


def train_ours(config: Config, batches: Iterator[MicroBatch]) -> None:
    class InMemory(Runtime):
        def __init__(self) -> None:
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self.store: Any = Printed()
            self._flags = LateFlags()

        def batches(self, images_seen: int) -> Iterator[MicroBatch]:
            return batches

        class_names: Any = ()

        def decoder(self) -> None:
            return None

        def held_out(self) -> None:
            return None

        def latest_checkpoint(self) -> Any:
            return nullcontext(None)

    class Printed:
        def metrics(self, values: Mapping[str, float], images_seen: int) -> None:
            say({"step": images_seen // config.train.batch_size, "loss": values["train/loss"]})

        def facts(self) -> dict[str, float]:
            return {}

        def progress(self, progress: Progress) -> None: ...

        def goodput(self) -> float:
            return 1.0

    loop.train(config, InMemory())


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


def train_lucidrains(
    config: Config, batches: Iterator[Tensor], autocast: bool = False, compiled: bool = False
) -> None:
    """The step of denoising-diffusion-pytorch's Trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = config.model.image_size
    model = GaussianDiffusion(lucidrains_net(config), image_size=size, objective="pred_noise").to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(model, beta=0.995, update_every=10)
    if compiled:
        model.model.compile()
    for x_0 in batches:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(x_0 * 0.5 + 0.5)  # its images are in [0, 1]
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()


def diffusers_net(config: Config) -> nn.Module:
    """UNet2DModel with the sizes, and the first weights, of our net; it takes its own timesteps, 0 to 999."""
    import diffusers

    from ddpm.export.diffusers_config import unet_config
    from ddpm.export.export import to_their_names

    net = diffusers.UNet2DModel(**unet_config(override(config, {"schedule.num_timesteps": 1000})))
    net.load_state_dict(to_their_names(build_net(config).state_dict(), config, net.state_dict()))
    return net.to("cuda" if torch.cuda.is_available() else "cpu")


def lucidrains_net(config: Config) -> nn.Module:
    """Unet with the resolutions of our net, and a width that gives about as many weights."""
    from denoising_diffusion_pytorch import Unet

    def net(width: int) -> nn.Module:
        return Unet(width, dim_mults=config.model.width_multipliers, channels=config.model.channels)

    wanted = parameter_count(build_net(config))
    return net(min(range(8, 256, 8), key=lambda width: abs(parameter_count(net(width)) - wanted)))


def difference(config: Config) -> float:
    """Largest difference of our net's output from diffusers'; outputs are about 1."""
    config = override(config, {"model.zero_init": False, "model.dropout": 0.0})
    ours = build_net(config)
    theirs = diffusers_net(config).cpu()
    x_t = next(float_batches(config, iter([None]), "cpu"))
    t = torch.arange(config.train.micro_batch_size)
    with torch.no_grad():
        return (ours(x_t, t) - theirs(x_t, t * ours.time_scale).sample).abs().max().item()


# Turns


def say(values: dict[str, Any]) -> None:
    print("SAID " + json.dumps(values), flush=True)


def turns(batches_per_step: int) -> Iterator[None]:
    """One item for each batch of the steps requested on the standard input: "3", or "3 profile"."""
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
        if torch.cuda.is_available():
            said["gib"] = torch.cuda.max_memory_allocated() / 2**30
        if profiled:
            said["operators"] = {
                event.key: max(event.self_cpu_time_total, event.self_device_time_total) / 1e3 / int(steps)
                for event in profiler.key_averages()
            }
        say(said)


def pictures(config: Config) -> np.ndarray:
    """scikit-learn's digits, enlarged: uint8 [N, H, W, C]."""
    from sklearn.datasets import load_digits

    size = config.model.image_size
    channels = config.model.channels
    grey = torch.from_numpy(load_digits().images).float()[:, None] * (255 / 16)
    grey = F.interpolate(grey, (size, size), mode="bilinear").round().to(torch.uint8)
    return grey.expand(-1, channels, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def micro_batches(config: Config, turns: Iterator[None]) -> Iterator[MicroBatch]:
    image = pictures(config)
    size = config.train.micro_batch_size
    label = np.zeros(size, np.int64)
    for i, _ in enumerate(turns):
        rows = np.arange(i * size, (i + 1) * size) % len(image)
        yield MicroBatch(image[rows], label, i % (config.train.batch_size // size))


def float_batches(config: Config, turns: Iterator[None], device: str) -> Iterator[Tensor]:
    image = torch.tensor(pictures(config))
    size = config.train.micro_batch_size
    x_0 = (image.permute(0, 3, 1, 2) / 127.5 - 1).contiguous().to(device)
    for i, _ in enumerate(turns):
        yield x_0[torch.arange(i * size, (i + 1) * size, device=device) % len(x_0)]


def main() -> None:
    """Run a contestant until the standard input ends."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    name = arguments.name.removeprefix(BEFORE)
    config = override(arguments.config(), NEVER)
    if name in OURS:
        values = dict(OURS[name])
        if arguments.log_every_steps:
            values["train.log_every_images"] = arguments.log_every_steps * config.train.batch_size
        config = override(config, values)
        share = config.train.batch_size // config.train.micro_batch_size
        train_ours(config, micro_batches(config, turns(share)))
        return
    # Peers take the whole batch at once.
    config = override(config, {"train.micro_batch_size": config.train.batch_size})
    batches = float_batches(config, turns(1), arguments.device)
    if name in DIFFUSERS:
        train_diffusers(config, batches, **DIFFUSERS[name])
    else:
        train_lucidrains(config, batches, **LUCIDRAINS[name])


if __name__ == "__main__":
    main()
