"""From a net and its config to images: seeds, labels, guidance and sampler together.

Training (its grids), jobs/sample.py and the registry's server sample alike: image i is a function of the seed and i
alone.

Axes: N images, C channels, H W.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.build import build_sampler
from ddpm.config import Config, SampleConfig
from ddpm.data import image_folder
from ddpm.diffusion import denoisers, process, schedules
from ddpm.diffusion.denoisers import Denoise
from ddpm.diffusion.inpainting import Known
from ddpm.diffusion.objectives import Denoised, Model, Objective
from ddpm.diffusion.samplers import OnStep, PerImageNoise
from ddpm.utils import images
from ddpm.utils.generators import PhiloxGenerator
from ddpm.utils.images import Pixels
from ddpm.utils.seeding import Purpose

NOISING_COLUMNS = 10
DENOISING_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
TRAJECTORY_COLUMNS = 10


def read_known(
    image: Path, mask: Path, config: Config, num_resamples: int = 10, jump_length: int = 10
) -> Known:
    """The input of inpainting, from two image files: white in `mask` keeps the pixel of `image`, black samples it.

    Both are resized and cropped to the centre square, as training data is.

    Raises:
        UserError: a file cannot be read.
    """
    size, channels = config.model.image_size, config.model.channels
    x_0, keep = (
        torch.from_numpy(np.asarray(image_folder.store([image_folder.read_file(path)], size, c, "raw")))
        for path, c in ((image, channels), (mask, 1))
    )
    return Known(images.to_model(x_0), (images.to_model(keep) > 0).float(), num_resamples, jump_length)


def labels(config: Config, indices: Sequence[int], label: int | None = None) -> NDArray[np.int64]:
    """The classes for a conditional net: `label`, or i mod num_classes if that is None; int64 [N]."""
    return np.array([i % config.model.num_classes if label is None else label for i in indices], np.int64)


@torch.no_grad()
def draw(
    net: Model,
    config: Config,
    objective: Objective,
    indices: Sequence[int],
    *,
    device: torch.device,
    sample: SampleConfig | None = None,
    label: Tensor | None = None,
    known: Known | None = None,
    x_0_error: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw the images with these indices, in one batch.

    Args:
        net: trained under `config`.
        indices: image i depends on the seed, i, and its label alone.
        sample: the sampler's settings; default: config.sample.
        label: [N] int64; default for a conditional net: i mod num_classes.
        known: a given part of every image, for inpainting.
        x_0_error: for the variance "measured", [T] float64.
        on_step: called at every step of the sampler.

    Returns:
        uint8 [N, H, W, C] on `device`.
    """
    sample = sample or config.sample
    if label is None and config.model.num_classes:
        label = torch.from_numpy(labels(config, indices)).to(device)
    noise = _noise(config, sample.seed, indices, device)
    denoise = _denoise(net, config, sample, objective, label)
    return images.to_uint8(build_sampler(config, sample, known, x_0_error)(denoise, noise, on_step))


@torch.no_grad()
def noising_strip(config: Config, x_0: Tensor) -> Pixels:
    """The forward process on real images x_0 [N, C, H, W], from clean to noise: one row per image."""
    levels = [i / (NOISING_COLUMNS - 1) for i in range(NOISING_COLUMNS)]
    frames = [_corrupt(config, x_0, level)[0] if level else x_0 for level in levels]
    return images.strip(_rows(frames), [_caption(config, level) for level in levels])


@torch.no_grad()
def denoising_strip(
    net: Model, config: Config, objective: Objective, x_0: Tensor, label: Tensor | None = None
) -> Pixels:
    """Denoising of real images x_0 [N, C, H, W] at rising noise levels: pairs of x_t and x_0_hat."""
    frames, captions = [x_0], ["x_0"]
    for level in DENOISING_LEVELS:
        x_t, t = _corrupt(config, x_0, level)
        frames += [x_t, objective.denoise(net, x_t, t, label).x_0_hat]
        captions += [_caption(config, level), "x_0_hat"]
    return images.strip(_rows(frames), captions)


def trajectory(
    net: Model,
    config: Config,
    objective: Objective,
    indices: Sequence[int],
    *,
    device: torch.device,
    sample: SampleConfig | None = None,
    label: Tensor | None = None,
    known: Known | None = None,
    x_0_error: Tensor | None = None,
) -> tuple[Pixels, bytes]:
    """The reverse process, from noise to images: a strip (one row per image), and a GIF of a grid."""
    frames: list[Tensor] = []
    last = draw(
        net,
        config,
        objective,
        indices,
        device=device,
        sample=sample,
        label=label,
        known=known,
        x_0_error=x_0_error,
        on_step=lambda step, x_t, x_0_hat: frames.append(images.to_uint8(x_t).cpu()),
    )
    frames.append(last.cpu())
    picked = [round(i * (len(frames) - 1) / (TRAJECTORY_COLUMNS - 1)) for i in range(TRAJECTORY_COLUMNS)]
    rows = torch.stack([frames[i] for i in picked], dim=1).numpy()
    moving = [images.grid(frames[i].numpy()) for i in range(0, len(frames), max(1, len(frames) // 50))]
    moving += [images.grid(frames[-1].numpy())] * 10  # rest on the result
    captions = ["noise", *[f"step {i}" for i in picked[1:]]]
    return images.strip(list(rows), captions), images.gif_bytes(moving, ms=80)


def _denoise(
    net: Model, config: Config, sample: SampleConfig, objective: Objective, label: Tensor | None
) -> Denoise:
    """The net as a function for samplers: with `label`, and guidance if `sample` has it."""

    def conditional(x_t: Tensor, t: Tensor) -> Denoised:
        return objective.denoise(net, x_t, t, label)

    def unconditional(x_t: Tensor, t: Tensor) -> Denoised:
        return objective.denoise(net, x_t, t, None)

    if label is None:
        return conditional
    return denoisers.guided(
        conditional, unconditional, sample.guidance_scale, sample.guidance_interval, _noise_level(config)
    )


def _noise_level(config: Config) -> Callable[[Tensor], Tensor]:
    """From t [B] to the noise level of guidance_interval: sigma, or for uniform_mix the amount, which is t itself."""
    if config.objective.process == "uniform_mix":
        return lambda amount: amount
    sigma = schedules.build(config.schedule).sigma
    return lambda t: sigma.float().to(t.device)[t]


def _noise(config: Config, seed: int, indices: Sequence[int], device: torch.device) -> PerImageNoise:
    """Noise for the images with these indices, drawn on the CPU for any device."""
    side = config.model.image_size
    generators = [PhiloxGenerator(seed, Purpose.SAMPLE, i) for i in indices]
    uniform = config.objective.process == "uniform_mix"
    return PerImageNoise(generators, (config.model.channels, side, side), device, uniform)


def _corrupt(config: Config, x_0: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """x_0 at a noise level in [0, 1] (t / (T - 1), or the amount), always the same noise; and its t [N]."""
    noise = _noise(config, config.sample.seed, range(len(x_0)), x_0.device)()
    if config.objective.process == "uniform_mix":
        amount = torch.full((len(x_0),), level, device=x_0.device)
        return process.mix(x_0, amount, noise), amount
    schedule = schedules.build(config.schedule)
    t = torch.full((len(x_0),), _timestep(config, level), device=x_0.device)
    return process.q_sample(schedule.alpha_bar, x_0, t, noise), t


def _timestep(config: Config, level: float) -> int:
    return round(level * (config.schedule.num_timesteps - 1))


def _caption(config: Config, level: float) -> str:
    if level == 0:
        return "x_0"
    return f"{level:.0%}" if config.objective.process == "uniform_mix" else f"t={_timestep(config, level)}"


def _rows(frames: list[Tensor]) -> list[Pixels]:
    """F frames of [N, C, H, W] as N rows of uint8 [F, H, W, C]."""
    return list(torch.stack([images.to_uint8(frame).cpu() for frame in frames], dim=1).numpy())
