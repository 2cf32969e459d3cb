"""RePaint: sample a part of an image, given the rest, with a net that was trained on whole images.

    python examples/inpainting/inpaint.py RUN --image IMAGE --mask MASK --out DIR

A sampler is a function sampler(denoise, noise, on_step); this one is given to `ddpm.Run.sample`.

Paper: Lugmayr et al. 2022, RePaint: Inpainting using DDPMs, arXiv:2201.09865

Axes: B batch, C channels, H W height and width, T timesteps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor

import ddpm
from ddpm.build import build_schedule
from ddpm.cli import parsing
from ddpm.config.tree import Config
from ddpm.diffusion import timesteps as spacings
from ddpm.diffusion.guidance import Denoise, Threshold, clip, predict
from ddpm.diffusion.process import posterior_mean, same_t
from ddpm.diffusion.samplers import Noise, OnStep
from ddpm.diffusion.schedules import Schedule
from ddpm.utils import images
from ddpm.utils.errors import UserError

FEW = 250
"""Default number of steps, as in the paper."""


@dataclass(frozen=True)
class Known:
    """A given image, the mask of the pixels to keep, and how RePaint samples the others."""

    x_0: Tensor
    """[B or 1, C, H, W] in [-1, 1]; its values where mask is 0 do not matter."""
    mask: Tensor
    """[B or 1, C or 1, H, W]: 1 keeps the pixel of x_0, 0 draws it."""
    num_resamples: int = 10
    """RePaint resampling passes per jump, at least 1; 1 replaces the known pixels only."""
    jump_length: int = 10
    """Steps per jump back, less than the n sampling steps if there are any jumps."""


@torch.no_grad()
def inpaint(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    *,
    known: Known,
    timesteps: Sequence[int],
    threshold: Threshold | None = clip,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample the pixels where the mask is 0, given the others; the result is exactly x_0 where the mask is 1.

    After each step of `ancestral` (variance beta_tilde) the known pixels are replaced by x_0 with as much noise as the
    others have. The two parts were not sampled together and do not fit together; adding the noise of a few steps and
    removing it again, several times, harmonises them. A jump adds the noise of jump_length steps at once. Jumps begin
    with 1, 1 + jump_length, 1 + 2 jump_length, ... steps left, as long as they end within the n steps; so the net is
    called once at the last timestep.

    Args (others as in `samplers`):
        denoise: called at the timesteps, and (num_resamples - 1) jump_length times more for each start of a jump.
        noise: drawn once, and once per step and jump.

    Source: Lugmayr et al. 2022, Algorithm 1 and App. B (jumps); get_schedule_jump of their code.
    """
    n = len(timesteps)
    jump_length = known.jump_length
    check_jumps(known, n)
    chain = spacings.respaced(schedule, timesteps)
    alpha_bar = [1.0, *chain.alpha_bar.tolist()]  # index: k, the number of steps left
    # As in the authors' get_schedule_jump; it counts timesteps, and at timestep t there are t + 1 steps left.
    jumps = dict.fromkeys(range(1, n - jump_length + 1, jump_length), known.num_resamples - 1)
    x = noise()
    x_0 = _fitted("x_0", known.x_0.to(x), x)
    keep = _fitted("mask", _as_bool(known.mask).to(x.device), x)
    k = n
    step = 0
    while k > 0:
        x_0_hat = predict(denoise, schedule, x, timesteps[n - k], threshold).x_0_hat
        if on_step is not None:
            on_step(step, x, x_0_hat)
        k = k - 1
        step = step + 1
        z = noise()  # one draw for both: each pixel is either known or unknown
        mean = posterior_mean(chain, x_0_hat, x, same_t(k, x))
        unknown = mean + float(chain.posterior_variance[k]) ** 0.5 * z
        kept = alpha_bar[k] ** 0.5 * x_0 + (1 - alpha_bar[k]) ** 0.5 * z
        x = torch.where(keep, kept, unknown)
        if jumps.get(k, 0) > 0:
            jumps[k] -= 1
            share = alpha_bar[k + jump_length] / alpha_bar[k]
            x = share**0.5 * x + (1 - share) ** 0.5 * noise()
            k += jump_length
    return x


def check_jumps(known: Known, num_sample_steps: int) -> None:
    """Raise ValueError for jumps that do not fit into `num_sample_steps`."""
    if known.num_resamples < 1:
        raise ValueError(f"num_resamples is {known.num_resamples}; it must be 1, 2, ...")
    if known.jump_length < 1 or (known.num_resamples > 1 and known.jump_length >= num_sample_steps):
        allowed = f"at least 1 and less than the {num_sample_steps} steps"
        raise ValueError(f"jump_length is {known.jump_length}; it must be {allowed}")


def _as_bool(mask: Tensor) -> Tensor:
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask has values other than 0 and 1; it must be 1 where x_0 is kept, else 0")
    return mask == 1


def _fitted(name: str, value: Tensor, x: Tensor) -> Tensor:
    """`value` [B or 1, C or 1, H, W] with the shape of x."""
    try:
        return value.expand(x.shape)
    except RuntimeError:
        got = tuple(value.shape)
        right = tuple(x.shape)
        raise ValueError(f"{name} has shape {got}; it must fit that of the images, {right}") from None


def read_known(image: Path, mask: Path, config: Config, num_resamples: int, jump_length: int) -> Known:
    """The known part of an image file, at the net's size: what is white in the file `mask`."""
    channels = config.model.channels
    x_0 = images.to_model(_pixels(image, "L" if channels == 1 else "RGB", config.model.image_size))
    keep = images.to_model(_pixels(mask, "L", config.model.image_size)) > 0
    return Known(x_0, keep.float(), num_resamples, jump_length)


def _pixels(file: Path, mode: str, size: int) -> Tensor:
    """The centre square of an image file: uint8 [1, size, size, C]."""
    with Image.open(file) as opened:
        square = ImageOps.fit(ImageOps.exif_transpose(opened).convert(mode), (size, size))
    return torch.tensor(np.atleast_3d(np.asarray(square)))[None]


@dataclass(frozen=True)
class Arguments:
    """The net, the known part, and how the rest is sampled."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or URI of a run or checkpoint, a registered model, or a built-in net."""
    image: Path
    """Image file; its centre square is resized to the net's size."""
    mask: Path
    """Image file, white where `image` is kept."""
    out: Path
    """New folder for the images."""
    num_images: int = 16
    seed: int = 0
    label: str | None = None
    """Class to sample, its name or number (conditional nets). None: all classes in turn."""
    num_sample_steps: int | None = None
    """None: 250, or all of fewer timesteps."""
    num_resamples: int = 10
    """Resampling passes per jump; 1: no resampling."""
    jump_length: int = 10
    """Steps per jump back."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    run = ddpm.Run(arguments.run)
    config = run.trained.config
    if config.objective.process != "gaussian":
        raise UserError(f"RUN has the process {config.objective.process}; RePaint needs gaussian")
    schedule = build_schedule(config.schedule)
    num_sample_steps = arguments.num_sample_steps or min(FEW, schedule.num_timesteps)
    try:
        known = read_known(
            arguments.image, arguments.mask, config, arguments.num_resamples, arguments.jump_length
        )
        check_jumps(known, num_sample_steps)
        timesteps = spacings.uniform(schedule.num_timesteps, num_sample_steps)
        arguments.out.mkdir(parents=True)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None

    def sampler(denoise: Denoise, noise: Noise, on_step: OnStep | None = None) -> Tensor:
        return inpaint(denoise, schedule, noise, known=known, timesteps=timesteps, on_step=on_step)

    drawn = run.sample(arguments.num_images, arguments.seed, arguments.label, sampler)
    for i, pixels in enumerate(drawn):
        (arguments.out / f"{i:06d}.png").write_bytes(images.png_bytes(pixels))
    (arguments.out / "grid.png").write_bytes(images.png_bytes(images.grid(drawn)))
    print(f"grid        {arguments.out}/grid.png")


if __name__ == "__main__":
    parsing.run(main)
