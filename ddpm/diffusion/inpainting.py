"""RePaint: inpainting with a net that was trained on whole images.

Paper: Lugmayr et al. 2022, RePaint: Inpainting using DDPMs, arXiv:2201.09865

Axes: B batch, C channels, H W height and width, T timesteps.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm.diffusion import timesteps as spacings
from ddpm.diffusion.denoisers import Denoise, Threshold, build_threshold, clip, predict
from ddpm.diffusion.process import posterior_mean
from ddpm.diffusion.samplers import Noise, OnStep, Sampler
from ddpm.diffusion.schedules import Schedule

if TYPE_CHECKING:
    from ddpm.config import SampleConfig

FEW = 250
"""Default number of steps, as in the paper."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A given image, and the mask of the pixels to keep."""

    x_0: Tensor
    """[1, C, H, W] float32 in [-1, 1]."""
    mask: Tensor
    """[1, 1, H, W]: 1 keeps the pixel, 0 draws it."""
    num_resamples: int = 10
    """RePaint resampling passes per jump."""
    jump_length: int = 10


@torch.no_grad()
def inpaint(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    *,
    x_0: Tensor,
    mask: Tensor,
    timesteps: Sequence[int],
    num_resamples: int = 10,
    jump_length: int = 10,
    threshold: Threshold | None = clip,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample the pixels where the mask is 0, given the others.

    After each step of `ancestral` (variance beta_tilde) the known pixels are replaced by x_0 with as much noise as the
    others have. The two parts were not sampled together and do not fit together; adding the noise of a few steps and
    removing it again, several times, harmonises them. A jump adds the noise of jump_length steps at once. Jumps begin
    with 1, 1 + jump_length, 1 + 2 jump_length, ... steps left, as long as they end within the n steps; so the net is
    called once at the last timestep.

    Args:
        denoise: called at the timesteps, and (num_resamples - 1) jump_length times more for each start of a jump.
        schedule: the one the net was trained with.
        noise: standard normal; drawn once, and once per step and jump.
        x_0: [B or 1, C, H, W] in [-1, 1], the given image; its values where mask is 0 do not matter.
        mask: [B or 1, C or 1, H, W]: 1 keeps the pixel of x_0, 0 draws it.
        timesteps: n of them, falling.
        num_resamples: RePaint resampling passes per jump, at least 1; 1 replaces the known pixels only.
        jump_length: steps per jump back, in 1..n-1 if there are any jumps.
        threshold: applied to x_0_hat.
        on_step: called at every step.

    Returns:
        [B, C, H, W]; exactly x_0 where mask is 1.

    Raises:
        ValueError: the mask has values other than 0 and 1, or a shape or parameter does not fit.

    Source: Lugmayr et al. 2022, Algorithm 1 and App. B (jumps); get_schedule_jump of their code.
    """
    n = len(timesteps)
    _check_jumps(num_resamples, jump_length, n)
    chain = spacings.respaced(schedule, timesteps)
    alpha_bar = [1.0, *chain.alpha_bar.tolist()]  # index: k, the number of steps left
    # As in the authors' get_schedule_jump; it counts timesteps, and at timestep t there are t + 1 steps left.
    jumps = dict.fromkeys(range(1, n - jump_length + 1, jump_length), num_resamples - 1)
    x = noise()
    x_0, keep = _fitted("x_0", x_0.to(x), x), _fitted("mask", _as_bool(mask).to(x.device), x)
    k, step = n, 0
    while k > 0:
        x_0_hat = predict(denoise, schedule, x, timesteps[n - k], threshold).x_0_hat
        if on_step is not None:
            on_step(step, x, x_0_hat)
        k, step = k - 1, step + 1
        z = noise()  # one draw for both: each pixel is either known or unknown
        mean = posterior_mean(chain, x_0_hat, x, torch.full((len(x),), k, device=x.device))
        unknown = mean + float(chain.posterior_variance[k]) ** 0.5 * z
        known = alpha_bar[k] ** 0.5 * x_0 + (1 - alpha_bar[k]) ** 0.5 * z
        x = torch.where(keep, known, unknown)
        if jumps.get(k, 0) > 0:
            jumps[k] -= 1
            kept = alpha_bar[k + jump_length] / alpha_bar[k]
            x = kept**0.5 * x + (1 - kept) ** 0.5 * noise()
            k += jump_length
    return x


def build(
    config: "SampleConfig",
    schedule: Schedule,
    x_0: Tensor,
    mask: Tensor,
    num_resamples: int = 10,
    jump_length: int = 10,
) -> Sampler:
    """`inpaint` with the timesteps and the threshold that `config` describes; its sampler must be ddpm.

    Raises:
        ValueError: another sampler, or a setting out of its range.
    """
    if config.sampler != "ddpm":
        raise ValueError(f"sampler is {config.sampler!r}; inpainting works with ddpm only")
    if config.num_sample_steps is None:
        config = dataclasses.replace(config, num_sample_steps=min(FEW, schedule.num_timesteps))
    threshold, timesteps = build_threshold(config), spacings.build(config, schedule, x_0[0].numel())
    _check_jumps(num_resamples, jump_length, len(timesteps))
    return lambda denoise, noise, on_step=None: inpaint(
        denoise,
        schedule,
        noise,
        x_0=x_0,
        mask=mask,
        timesteps=timesteps,
        num_resamples=num_resamples,
        jump_length=jump_length,
        threshold=threshold,
        on_step=on_step,
    )


def _check_jumps(num_resamples: int, jump_length: int, num_sample_steps: int) -> None:
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; it must be 1, 2, ...")
    if jump_length < 1 or (num_resamples > 1 and jump_length >= num_sample_steps):
        raise ValueError(
            f"jump_length is {jump_length}; it must be at least 1 and less than the {num_sample_steps} steps"
        )


def _as_bool(mask: Tensor) -> Tensor:
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask has values other than 0 and 1; it must be 1 where x_0 is kept, else 0")
    return mask == 1


def _fitted(name: str, value: Tensor, x: Tensor) -> Tensor:
    """`value` [B or 1, C or 1, H, W] with the shape of x."""
    try:
        return value.expand(x.shape)
    except RuntimeError:
        got, right = tuple(value.shape), tuple(x.shape)
        raise ValueError(f"{name} has shape {got}; it must fit that of the images, {right}") from None
