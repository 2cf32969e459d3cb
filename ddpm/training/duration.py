"""How long training takes, before it starts: measured on this machine for a second, and computed for a GPU.

Neither knows of reading, checkpoints and samples, nor of what workers cost each other.
"""

import time
from dataclasses import replace

import torch

from ddpm.build import build_net
from ddpm.config import kinds
from ddpm.config.tree import Config
from ddpm.training import mfu
from ddpm.training.footprint import META, footprint
from ddpm.utils import devices

H100_FLOPS = 989e12 * 0.239
"""FLOP/s of an H100 at the share of its peak that Ho et al. 2020 reached on a TPU (docs/design/scale.md)."""
CORE_FLOPS = 200e9
"""FLOP/s that a CPU's core does not exceed in training; those with AVX-512 reach a half of it, and less."""
MEASURED_S = 1.0
MAX_MEMORY = 2e9
"""Bytes that the measured passes may take."""
LEAST_GPU_S = 60.0
"""What would take a GPU less is not said: starting kernels takes more than their operations."""
LONG_S = 86_400.0
"""Training on CPUs that takes longer is warned of."""


def flops_per_image(config: Config) -> float | None:
    """FLOPs of training on one image; None: the net cannot run on the meta device."""
    with META:
        net = build_net(replace(config, train=replace(config.train, precision="float32"))).eval()
    try:
        return mfu.flops_per_image(net, config)
    except (NotImplementedError, RuntimeError):  # a net with operations that need numbers
        return None


def measured_images_per_s(config: Config) -> float:
    """Forward and backward passes of random images on this machine's accelerator, or on all of its cores."""
    device = devices.default()
    net = build_net(config).to(device).eval()  # in training, dropout needs keys
    takes = footprint(config)
    num_images = takes.images
    if takes.memory is None or takes.memory > MAX_MEMORY:
        num_images = min(config.train.micro_batch_size, takes.images)
    x_t = torch.randn(num_images, config.model.channels, config.model.image_size, config.model.image_size)
    x_t = x_t.to(device)
    t = torch.zeros(num_images, dtype=torch.int64, device=device)
    uses_time = kinds.objective(config.objective.process).uses_time

    def train() -> None:
        net(x_t, t if uses_time else None, None).square().mean().backward()
        if device != devices.CPU:
            torch.accelerator.synchronize()

    train()  # the first pass allocates and chooses kernels
    num_passes = 0
    start = time.perf_counter()
    while time.perf_counter() - start < MEASURED_S:
        train()
        num_passes += 1
    return num_passes * num_images / (time.perf_counter() - start)


def about(config: Config) -> str:
    """A line for people: operations an image, and how long training takes here and on a GPU."""
    total = config.train.total_images
    rate = measured_images_per_s(config)
    here = f"{_duration(total / rate)} on {devices.hardware()} ({rate:,.0f} images/s, measured for a second)"
    flops = flops_per_image(config)
    if flops is None:
        return here
    line = f"{flops / 1e9:,.2g} GFLOP an image; {here}"
    gpu_s = total * flops / H100_FLOPS
    if gpu_s < LEAST_GPU_S:
        return line
    return f"{line}, {_duration(gpu_s)} on an H100 (computed, not run)"


def warning(config: Config, num_cores: float) -> str | None:
    """A warning if training takes days on CPUs, however fast they are; else None."""
    rate = CORE_FLOPS * num_cores
    of_weights = footprint(config).weights * config.model.image_size**2
    # Each weight takes part at each pixel at most, in three passes: most runs need no count, which takes a second.
    if config.train.total_images * 6.0 * of_weights < LONG_S * rate:
        return None
    flops = flops_per_image(config)
    least_s = 0.0 if flops is None else config.train.total_images * flops / rate
    if least_s < LONG_S:
        return None
    return (
        f"training takes {_duration(least_s)} or more on {num_cores:g} CPU cores; the presets digits, fashion-mnist "
        "and folder with --net small are for CPUs, and fewer --total-images or a smaller --size take less"
    )


def _duration(seconds: float) -> str:
    """A duration as text, such as 1.3 h."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
