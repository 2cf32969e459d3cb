"""The variational bound: an upper bound of the bits per pixel and channel that a model needs to store an image.

-log p(x_0) <= prior + sum over t of KL_t + decoder, each averaged over the D = C H W dimensions and divided by log 2.
Unlike the training loss it does not depend on the schedule, the objective or the weights of the loss:

    prior    KL( q(x_T | x_0) || N(0, I) ): information about the image left in x_T, closed form
    KL_t     KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ), t = 1..T-1, closed form given a draw of x_t
    decoder  -log p(x_0 | x_t) at t = 0, a Gaussian summed over the width of a grey level

A net is `denoise(x_t, t) -> Denoised`, as for the samplers, and p has the mean and one of the variances of the sampler
`ancestral` (`reverse`): compare bounds of the same variance only. The caller gives the noise. Squares are summed in the
images' float32; everything after is float64 on the CPU.

Papers:
    Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
    Nichol & Dhariwal 2021, Improved DDPM, arXiv:2102.09672 (importance-sampled t)
    Kingma et al. 2021, Variational Diffusion Models, arXiv:2107.00630 (KL_t as a difference of snr)

Axes: B batch, C channels, H W height and width, T timesteps, K timesteps measured of an image.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.diffusion.denoisers import Denoise
from ddpm.diffusion.process import q_sample
from ddpm.diffusion.reverse import (
    LEVELS,
    Variance,
    fixed_variance,
    gaussian_kl,
    learned_log_variance,
    log_prob_of_level,
)
from ddpm.diffusion.samplers import Noise
from ddpm.diffusion.schedules import Schedule

TINY = 1e-300
"""Below any KL and any error; replaces a sum of 0."""
MEASURED_TIMESTEPS = 64
"""Timesteps at which the error of x_0_hat is measured; it is smooth in log SNR."""


class Bound(NamedTuple):
    """The bound of each image, term by term, in bits/dim; float64 on the CPU."""

    prior: Tensor
    """[B]."""
    t: Tensor
    """[B, K] int64 in 1..T-1: where KL_t was measured."""
    kl: Tensor
    """[B, K]: KL_t times its weight; the sum over K is the sum over all t, or an unbiased estimate of it."""
    decoder: Tensor
    """[B]."""

    @property
    def total(self) -> Tensor:
        """[B]: the bound."""
        return self.prior + self.kl.sum(1) + self.decoder


@torch.no_grad()
def exact(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    noise: Noise,
    *,
    variance: Variance = "beta_tilde",
    x_0_error: Tensor | None = None,
    clip_x_0: bool = True,
) -> Bound:
    """Every term, with T evaluations of the net; x_t is drawn once for each t.

    Args:
        denoise: at every t of the schedule.
        schedule: the one the net was trained with.
        x_0: [B, C, H, W] float32, 8-bit images in [-1, 1].
        noise: standard normal [B, C, H, W]; drawn T times, from t = 0 on.
        variance: of p(x_{t-1} | x_t).
        x_0_error: for "measured", [T] float64, from other images than x_0: the mean of `x_0_errors`.
        clip_x_0: clip x_0_hat to [-1, 1], as `ancestral` does with the mean "clipped".

    Raises:
        ValueError: an unknown variance, or images that are not 8-bit.

    Source: Ho et al. 2020, Eq. 5.
    """
    T = schedule.num_timesteps
    p = _reverse(denoise, schedule, x_0, noise, variance, x_0_error, clip_x_0)
    return _bound(schedule, x_0, p, torch.arange(1, T).expand(len(x_0), T - 1), 1.0)


@torch.no_grad()
def estimate(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    noise: Noise,
    u: Tensor,
    proposal: Tensor,
    *,
    num_draws: int,
    variance: Variance = "beta_tilde",
    x_0_error: Tensor | None = None,
    clip_x_0: bool = True,
) -> Bound:
    """Every term as in `exact`, but the sum over t is estimated from `num_draws` timesteps.

    sum_t KL_t ~ 1 / K sum_k KL_{t_k} / proposal[t_k], t_k distributed as the proposal. The K timesteps of an image are
    spread evenly over the proposal, beginning at u: each keeps its distribution, and the error is smaller.

    Args:
        denoise: called num_draws + 1 times.
        schedule: the one the net was trained with.
        x_0: [B, C, H, W] float32, 8-bit images in [-1, 1].
        noise: standard normal [B, C, H, W]; drawn num_draws + 1 times.
        u: [B] float64 in [0, 1), uniform, drawn by the caller.
        proposal: [T] float64, from `proposal`.
        num_draws: K, at least 1.
        variance: as in `exact`.
        x_0_error: as in `exact`.
        clip_x_0: as in `exact`.

    Raises:
        ValueError: as `exact`; or the proposal is not a distribution over 1..T-1 that is positive there.

    Source: Nichol & Dhariwal 2021, Sec. 3.3.
    """
    T = schedule.num_timesteps
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}; it must be at least 1")
    _check_proposal(proposal, T)
    p = _reverse(denoise, schedule, x_0, noise, variance, x_0_error, clip_x_0)
    strata = (torch.arange(num_draws) + u[:, None].double().cpu()) / num_draws
    drawn = torch.searchsorted(proposal.cumsum(0), strata, right=True).clamp(1, T - 1)
    return _bound(schedule, x_0, p, drawn, num_draws * proposal[drawn])


@torch.no_grad()
def x_0_errors(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    noise: Noise,
    *,
    num_measured: int = MEASURED_TIMESTEPS,
    clip_x_0: bool = True,
) -> Tensor:
    """The squared error of x_0_hat at every t, each image's mean over its dimensions; [B, T] float64.

    It is measured at timesteps that are evenly spread in log SNR; its logarithm is interpolated between them.

    Args:
        denoise: called at most num_measured times.
        schedule: the one the net was trained with.
        x_0: [B, C, H, W].
        noise: standard normal [B, C, H, W]; drawn once per measured timestep.
        num_measured: at least 2; with T at most this, all timesteps are measured.
        clip_x_0: as in `exact`.
    """
    T, level = schedule.num_timesteps, schedule.log_snr
    wanted = torch.linspace(level[0].item(), level[-1].item(), num_measured, dtype=torch.float64)
    measured = torch.arange(T) if num_measured >= T else (level[:, None] - wanted).abs().argmin(0).unique()
    errors = [x_0_error_at(denoise, schedule, x_0, t, noise(), clip_x_0) for t in measured.tolist()]
    if len(errors) == 1:
        return errors[0][:, None]
    logs = torch.stack(errors, 1).clamp(min=TINY).log()
    right = torch.searchsorted(measured, torch.arange(T)).clamp(min=1)
    before, after = level[measured[right - 1]], level[measured[right]]
    return torch.lerp(logs[:, right - 1], logs[:, right], (before - level) / (before - after)).exp()


def x_0_error_at(
    denoise: Denoise, schedule: Schedule, x_0: Tensor, t: int, eps: Tensor, clip_x_0: bool
) -> Tensor:
    """The squared error of x_0_hat at t, each image's mean over its dimensions; [B] float64 on the CPU."""
    t_batch = _full(x_0, t)
    x_0_hat = denoise(q_sample(schedule.alpha_bar, x_0, t_batch, eps), t_batch).x_0_hat
    return _per_image((x_0 - (x_0_hat.clamp(-1, 1) if clip_x_0 else x_0_hat)).square())


def kl_of_errors(schedule: Schedule, x_0_errors: Tensor, variance: Tensor) -> Tensor:
    """KL_t of images whose x_0_hat has these errors, [B, T - 1] float64 in bits/dim, t = 1..T-1.

    Args:
        schedule: of T steps.
        x_0_errors: [B, T] float64.
        variance: of p, [T] float64 (`reverse.fixed_variance`).
    """
    log_q, log_p, weight = schedule.posterior_variance[1:].log(), variance[1:].log(), schedule.x_0_weight[1:]
    return gaussian_kl(log_q, log_p, weight**2 * x_0_errors[:, 1:]) / math.log(2)


def proposal(kl: Tensor, uniform_share: float = 0.1) -> Tensor:
    """The distribution of t that minimises the error of `estimate`: in proportion to sqrt(E[KL_t^2]).

    Args:
        kl: [B, T - 1] float64, KL_t of a few images at t = 1..T-1, from `exact` or `kl_of_errors`.
        uniform_share: in (0, 1], share of the draws from the uniform distribution, so that no t is rare.

    Returns:
        [T] float64, 0 at t = 0, with sum 1.

    Source: Nichol & Dhariwal 2021, Eq. 18.
    """
    if not 0 < uniform_share <= 1:
        raise ValueError(f"uniform_share is {uniform_share}; it must be in (0, 1]")
    rms = kl.square().mean(0).sqrt()
    share = (1 - uniform_share) * rms / rms.sum().clamp(min=TINY) + uniform_share / max(len(rms), 1)
    return torch.cat([torch.zeros(1, dtype=torch.float64), share / share.sum()])


def prior_kl(schedule: Schedule, x_0: Tensor) -> Tensor:
    """KL( q(x_T | x_0) || N(0, I) ) of each image, [B] float64 in bits/dim. Ho et al. 2020, Eq. 5, L_T."""
    alpha_bar = schedule.alpha_bar[-1]
    square = _per_image(x_0.square())
    return 0.5 * (alpha_bar * square - alpha_bar - torch.log1p(-alpha_bar)) / math.log(2)


def posterior_kl(schedule: Schedule, x_0: Tensor, t: Tensor, x_0_hat: Tensor, log_variance: Tensor) -> Tensor:
    """KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ) of each image, [B] float64 in bits/dim.

    Both are Gaussians whose means, mu_tilde of x_0 and of x_0_hat, differ by a multiple of x_0 - x_0_hat. With the
    variance beta_tilde it is (snr_{t-1} - snr_t) / 2 times the squared error of x_0_hat.

    Args:
        schedule: of T steps.
        x_0: [B, C, H, W].
        t: [B] int64 in 1..T-1; at t = 0 q has no width, and the decoder is used instead.
        x_0_hat: [B, C, H, W], a prediction of x_0 from x_t.
        log_variance: of p, [B] or [B, C, H, W].

    Source: Ho et al. 2020, Eqs. 5 and 7; Kingma et al. 2021, Eq. 13.
    """
    t = t.cpu()
    if bool((t < 1).any()):
        raise ValueError("t has a 0; it must be in 1..T-1")
    error = (x_0 - x_0_hat).square()
    error = _per_image(error) if log_variance.ndim == 1 else error.cpu().double()
    log_q, weight = (
        table[t].view(-1, *[1] * (error.ndim - 1))
        for table in (schedule.posterior_variance.log(), schedule.x_0_weight)
    )
    kl = gaussian_kl(log_q, log_variance.cpu().double(), weight**2 * error)
    return kl.reshape(len(t), -1).mean(1) / math.log(2)


def decoder_nll(x_0: Tensor, x_0_hat: Tensor, log_variance: Tensor) -> Tensor:
    """-log p(x_0 | x_t) at t = 0 of each image, [B] float64 in bits/dim.

    Args:
        x_0: [B, C, H, W], 8-bit images in [-1, 1].
        x_0_hat: [B, C, H, W], a prediction of x_0 from x_t.
        log_variance: of p, [B] or [B, C, H, W].

    Raises:
        ValueError: images that are not 8-bit.

    Source: Ho et al. 2020, Eq. 13.
    """
    level = (x_0.cpu().double() + 1) * (LEVELS - 1) / 2
    if bool(((level - level.round()).abs() > 1e-3).any()) or level.min() < -0.5 or level.max() > LEVELS - 0.5:
        raise ValueError(
            f"x_0 is not made of {LEVELS} grey levels in [-1, 1]; bits/dim are those of 8-bit images"
        )
    std = (0.5 * log_variance.cpu().double()).exp()
    std = std.view(-1, *[1] * (x_0.ndim - 1)) if std.ndim == 1 else std
    return -_per_image(log_prob_of_level(level.round(), x_0_hat.cpu().double(), std)) / math.log(2)


def _bound(
    schedule: Schedule,
    x_0: Tensor,
    p: Callable[[Tensor], tuple[Tensor, Tensor]],
    drawn: Tensor,
    share: Tensor | float,
) -> Bound:
    """The bound from KL_t at the timesteps `drawn` [B, K], each divided by its share [B, K]; `p` is from `_reverse`."""
    decoder = decoder_nll(x_0, *p(_full(x_0, 0)))
    at = drawn.to(x_0.device)
    kl = [posterior_kl(schedule, x_0, t, *p(t)) for t in at.unbind(1)]
    return Bound(
        prior_kl(schedule, x_0), drawn, torch.stack(kl, 1) / share if kl else drawn.double(), decoder
    )


def _reverse(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    noise: Noise,
    variance: Variance,
    x_0_error: Tensor | None,
    clip_x_0: bool,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x_0_hat and the logarithm of the variance, from an x_t drawn at the given t [B]."""
    fixed = None if variance == "learned" else fixed_variance(schedule, variance, x_0_error).log()

    def p(t: Tensor) -> tuple[Tensor, Tensor]:
        predicted = denoise(q_sample(schedule.alpha_bar, x_0, t, noise()), t)
        x_0_hat = predicted.x_0_hat.clamp(-1, 1) if clip_x_0 else predicted.x_0_hat
        if fixed is not None:
            return x_0_hat, fixed[t.cpu()]
        return x_0_hat, learned_log_variance(schedule, t, predicted.variance_mix)

    return p


def _full(x_0: Tensor, t: int) -> Tensor:
    return torch.full((len(x_0),), t, device=x_0.device)


def _per_image(values: Tensor) -> Tensor:
    """[B, C, H, W] as the mean of each image, float64 [B] on the CPU."""
    return values.flatten(1).mean(1).cpu().double()


def _check_proposal(proposal: Tensor, num_timesteps: int) -> None:
    is_one = proposal.shape == (num_timesteps,) and proposal.dtype == torch.float64 and len(proposal) > 1
    if not is_one or proposal[0] != 0 or proposal[1:].min() <= 0 or abs(proposal.sum() - 1) > 1e-6:
        raise ValueError(
            f"proposal must be float64 [{num_timesteps}] of sum 1, 0 at t = 0 and positive after; T must be above 1"
        )
