"""Functions between net and sampler: guidance, and clipping of an x_0_hat outside the range of images.

A sampler sees the net as `denoise(x_t, t) -> Denoised`. Every function here keeps the two predictions consistent: x_t
is x_0_hat noised with eps_hat.

Papers:
    guided   Ho & Salimans 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598
             Kynkäänniemi et al. 2024, Guidance in a Limited Interval, arXiv:2404.07724

Axes: B batch, C channels, H W height and width, T timesteps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.process import broadcast, predict_eps_from_x_0, same_t
from ddpm.diffusion.schedules import Schedule

Denoise = Callable[[Tensor, Tensor], Denoised]
"""denoise(x_t, t): t is [B] int64; for `samplers.mix` it is the amount of noise, [B] float in (0, 1]."""

Threshold = Callable[[Tensor], Tensor]
"""Maps x_0_hat [B, C, H, W] into the range of images."""


def predict(
    denoise: Denoise, schedule: Schedule, x_t: Tensor, t: int, threshold: Threshold | None
) -> Denoised:
    """The prediction of `denoise` at x_t [B, C, H, W], all at t, after `threshold`, with the consistent eps_hat."""
    t_batch = same_t(t, x_t)
    denoised = denoise(x_t, t_batch)
    if threshold is None:
        return denoised
    x_0_hat = threshold(denoised.x_0_hat)
    eps_hat = predict_eps_from_x_0(schedule.alpha_bar, x_t, t_batch, x_0_hat)
    return denoised._replace(x_0_hat=x_0_hat, eps_hat=eps_hat)


def clip(x_0_hat: Tensor, x_0_max: float = 1.0) -> Tensor:
    """x_0_hat clipped to [-x_0_max, x_0_max]."""
    return x_0_hat.clamp(-x_0_max, x_0_max)


def guided(
    denoise_cond: Denoise,
    denoise_uncond: Denoise,
    scale: float,
    interval: tuple[float, float] | None = None,
    level: Callable[[Tensor], Tensor] = lambda t: t,
) -> Denoise:
    """Classifier-free guidance: eps_hat = uncond + scale (cond - uncond), where the noise is in `interval`.

    The two are the net with labels and with the null label. At a given x_t, x_0_hat is affine in eps_hat, so the same
    combination of the two x_0_hat is consistent with it. A learned variance is the conditional one.

    Args:
        scale: 0 is unconditional, 1 is conditional (Imagen's convention; Ho & Salimans write 1 + w); a larger one
            trades variety for adherence to the label.
        interval: (low, high]; images at other noise levels are conditional. None: guidance everywhere.
        level: maps t [B] to the noise level [B] that `interval` refers to: sigma[t] as in the paper.

    Source: Ho & Salimans 2022, Eq. 6; Kynkäänniemi et al. 2024.
    """
    check_interval(interval)
    if scale == 1:
        return denoise_cond  # half the work

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        cond = denoise_cond(x_t, t)
        if interval is None:
            return _extrapolated(cond, denoise_uncond(x_t, t), scale)
        inside = (level(t) > interval[0]) & (level(t) <= interval[1])
        if not inside.any():
            return cond  # half the work
        inside = broadcast(inside, x_t)
        both = _extrapolated(cond, denoise_uncond(x_t, t), scale)
        x_0_hat = torch.where(inside, both.x_0_hat, cond.x_0_hat)
        eps_hat = torch.where(inside, both.eps_hat, cond.eps_hat)
        return cond._replace(x_0_hat=x_0_hat, eps_hat=eps_hat)

    return denoise


def check_interval(interval: tuple[float, float] | None) -> None:
    """Raise ValueError if `interval` is not 0 <= low < high."""
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance_interval is {interval}; it must be (low, high], 0 <= low < high")


def _extrapolated(cond: Denoised, uncond: Denoised, scale: float) -> Denoised:
    x_0_hat = uncond.x_0_hat + scale * (cond.x_0_hat - uncond.x_0_hat)
    eps_hat = uncond.eps_hat + scale * (cond.eps_hat - uncond.eps_hat)
    return cond._replace(x_0_hat=x_0_hat, eps_hat=eps_hat)
