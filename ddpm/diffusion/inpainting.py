"""RePaint: inpainting with a net that was trained on whole images.

Paper: Lugmayr et al. 2022, RePaint: Inpainting using DDPMs, arXiv:2201.09865

Axes: B batch, C channels, H W height and width, T timesteps.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm.diffusion import timesteps as spacings
from ddpm.diffusion.denoisers import Denoise, Threshold, clip, predict
from ddpm.diffusion.process import posterior_mean, same_t
from ddpm.diffusion.samplers import Noise, OnStep
from ddpm.diffusion.schedules import Schedule

FEW = 250
"""Default number of steps, as in the paper."""


@dataclasses.dataclass(frozen=True)
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
    n, jump_length = len(timesteps), known.jump_length
    check_jumps(known, n)
    chain = spacings.respaced(schedule, timesteps)
    alpha_bar = [1.0, *chain.alpha_bar.tolist()]  # index: k, the number of steps left
    # As in the authors' get_schedule_jump; it counts timesteps, and at timestep t there are t + 1 steps left.
    jumps = dict.fromkeys(range(1, n - jump_length + 1, jump_length), known.num_resamples - 1)
    x = noise()
    x_0, keep = _fitted("x_0", known.x_0.to(x), x), _fitted("mask", _as_bool(known.mask).to(x.device), x)
    k, step = n, 0
    while k > 0:
        x_0_hat = predict(denoise, schedule, x, timesteps[n - k], threshold).x_0_hat
        if on_step is not None:
            on_step(step, x, x_0_hat)
        k, step = k - 1, step + 1
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
    """Raise ValueError if the jumps of `known` do not fit into the steps."""
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
        got, right = tuple(value.shape), tuple(x.shape)
        raise ValueError(f"{name} has shape {got}; it must fit that of the images, {right}") from None
