"""The variational bound: an upper bound of the bits per pixel and channel that a model needs to store an image.

-log p(x_0) <= prior + sum over t of KL_t + decoder, each averaged over the D = C H W dimensions and divided by log 2.
Unlike the training loss it does not depend on the schedule, the objective or the weights of the loss:

    prior    KL( q(x_T | x_0) || N(0, I) ): information about the image left in x_T, closed form
    KL_t     KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ), t = 1..T-1, closed form given a draw of x_t
    decoder  -log p(x_0 | x_t) at t = 0, a Gaussian summed over the width of a grey level

p has the mean of the sampler `ancestral` (with x_0_hat clipped) and one of its variances: compare bounds of the same
variance only. Squares are summed in the images' float32; everything after is float64 on the CPU. The functions take,
as far as they need it:

    denoise       the net, `denoise(x_t, t) -> Denoised`, as for the samplers
    schedule      the one the net was trained with
    x_0           [B, C, H, W] float32, 8-bit images in [-x_0_max, x_0_max]
    x_0_max       1 for images; latents have a range of their own
    x_0_hat       [B, C, H, W], a prediction of x_0 from x_t
    noise         standard normal [B, C, H, W]; drawn once for each call of `denoise`, from t = 0 on
    variance      of p, [T] float64 (`reverse.fixed_variance`); None: the one that the net learned
    log_variance  of p at the given t, [B] or [B, C, H, W]

Terms and errors of images are [B] float64 on the CPU, the terms in bits/dim.

Papers:
    Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
    Nichol & Dhariwal 2021, Improved DDPM, arXiv:2102.09672 (importance-sampled t)
    Kingma et al. 2021, Variational Diffusion Models, arXiv:2107.00630 (KL_t as a difference of snr)

Axes: B batch, C channels, H W height and width, T timesteps, K timesteps measured of an image.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.diffusion.guidance import Denoise, clip
from ddpm.diffusion.process import broadcast, gather, q_sample, same_t
from ddpm.diffusion.reverse import LEVELS, gaussian_kl, learned_log_variance, log_prob_of_level
from ddpm.diffusion.samplers import Noise
from ddpm.diffusion.schedules import Schedule

TINY = 1e-300
"""Below any KL and any error; replaces a sum of 0."""
UNIFORM_SHARE = 0.1
"""Share of a proposal that is uniform, so that no t is rare."""
MEASURED_TIMESTEPS = 64
"""Timesteps at which the error of x_0_hat is measured; it is smooth in log SNR."""


class Bound(NamedTuple):
    """The bound of each image, term by term, in bits/dim; float64 on the CPU."""

    prior: Tensor
    """[B]."""
    kl: Tensor
    """[B, K]: KL_t at K timesteps, weighted; the sum over K is the sum over all t, or an unbiased estimate of it."""
    decoder: Tensor
    """[B]."""


class Timesteps(NamedTuple):
    """The timesteps at which `estimate` measures the bound of each image."""

    t: Tensor
    """[B, K] int64 in 1..T-1."""
    share: Tensor | float
    """[B, K], K times the probability of each t."""


def exact(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    noise: Noise,
    variance: Tensor | None,
    x_0_max: float = 1.0,
) -> Bound:
    """Every term, with T evaluations of the net; x_t is drawn once for each t. Ho et al. 2020, Eq. 5."""
    T = schedule.num_timesteps
    every = Timesteps(torch.arange(1, T).expand(len(x_0), T - 1), 1.0)
    return estimate(denoise, schedule, x_0, noise, variance, every, x_0_max)


@torch.no_grad()
def estimate(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    noise: Noise,
    variance: Tensor | None,
    timesteps: Timesteps,
    x_0_max: float = 1.0,
) -> Bound:
    """Every term, with the sum over t estimated from K timesteps of each image: sum_k KL_{t_k} / share_k.

    Source: Nichol & Dhariwal 2021, Sec. 3.3.
    """
    fixed = None if variance is None else variance.log()

    def p(t: Tensor) -> tuple[Tensor, Tensor]:
        """x_0_hat and log_variance, from an x_t drawn at t [B]."""
        denoised = denoise(q_sample(schedule.alpha_bar, x_0, t, noise()), t)
        if fixed is not None:
            log_variance = fixed[t.cpu()]
        else:
            log_variance = learned_log_variance(schedule, t, denoised.variance_mix)
        return clip(denoised.x_0_hat, x_0_max), log_variance

    x_0_hat, log_variance = p(same_t(0, x_0))
    decoder = decoder_nll(x_0, x_0_hat, log_variance, x_0_max)
    kl = []
    for t_k in timesteps.t.to(x_0.device).unbind(1):
        x_0_hat, log_variance = p(t_k)
        kl.append(posterior_kl(schedule, x_0, t_k, x_0_hat, log_variance))
    each = torch.stack(kl, 1) / timesteps.share if kl else timesteps.t.double()
    return Bound(prior_kl(schedule, x_0), each, decoder)


def draw_timesteps(schedule: Schedule, proposal: Tensor, u: Tensor, num_draws: int) -> Timesteps:
    """The timesteps of `estimate`, distributed as the proposal.

    The timesteps of an image are spread evenly over the proposal, beginning at u: the estimate stays unbiased, and its
    error is smaller.

    Args:
        proposal: [T] float64, from `proposal`.
        u: [B] float64 in [0, 1), uniform, drawn by the caller.
        num_draws: K, at least 1.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}; it must be at least 1")
    T = schedule.num_timesteps
    is_one = proposal.shape == (T,) and proposal.dtype == torch.float64 and T > 1
    if not is_one or proposal[0] != 0 or proposal[1:].min() <= 0 or abs(proposal.sum() - 1) > 1e-6:
        raise ValueError(
            f"proposal must be float64 [{T}] of sum 1, 0 at t = 0 and positive after; T must be above 1"
        )
    strata = (torch.arange(num_draws) + u[:, None].double().cpu()) / num_draws
    t = torch.searchsorted(proposal.cumsum(0), strata, right=True).clamp(1, T - 1)
    return Timesteps(t, num_draws * proposal[t])


@torch.no_grad()
def x_0_errors(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    noise: Noise,
    *,
    num_measured: int = MEASURED_TIMESTEPS,
    x_0_max: float = 1.0,
) -> Tensor:
    """The squared error of x_0_hat at every t, each image's mean over its dimensions; [B, T] float64.

    It is measured at timesteps that are evenly spread in log SNR; its logarithm is interpolated between them.

    Args:
        num_measured: at least 2; with T at most this, all timesteps are measured.
    """
    T = schedule.num_timesteps
    level = schedule.log_snr
    wanted = torch.linspace(level[0].item(), level[-1].item(), num_measured, dtype=torch.float64)
    measured = torch.arange(T) if num_measured >= T else (level[:, None] - wanted).abs().argmin(0).unique()
    errors = [_x_0_error_at(denoise, schedule, x_0, t, noise(), x_0_max) for t in measured.tolist()]
    if len(errors) == 1:
        return errors[0][:, None]
    logs = torch.stack(errors, 1).clamp(min=TINY).log()
    right = torch.searchsorted(measured, torch.arange(T)).clamp(min=1)
    before = level[measured[right - 1]]
    after = level[measured[right]]
    return torch.lerp(logs[:, right - 1], logs[:, right], (before - level) / (before - after)).exp()


def _x_0_error_at(
    denoise: Denoise, schedule: Schedule, x_0: Tensor, t: int, eps: Tensor, x_0_max: float
) -> Tensor:
    """The squared error of x_0_hat, clipped, at t: each image's mean over its dimensions."""
    t_batch = same_t(t, x_0)
    x_0_hat = denoise(q_sample(schedule.alpha_bar, x_0, t_batch, eps), t_batch).x_0_hat
    return _mean((x_0 - clip(x_0_hat, x_0_max)).square())


def kl_of_errors(schedule: Schedule, x_0_errors: Tensor, variance: Tensor) -> Tensor:
    """KL_t of images whose x_0_hat has the errors `x_0_errors` [B, T] with a fixed variance; [B, T - 1], t = 1..T-1."""
    log_q = schedule.posterior_variance[1:].log()
    log_p = variance[1:].log()
    weight = schedule.x_0_weight[1:]
    return gaussian_kl(log_q, log_p, weight**2 * x_0_errors[:, 1:]) / math.log(2)


def proposal(kl: Tensor) -> Tensor:
    """The distribution of t, [T] float64, that minimises the error of `estimate`: in proportion to sqrt(E[KL_t^2]).

    `kl` is KL_t of a few images at t = 1..T-1, [B, T - 1] float64, from `exact` or `kl_of_errors`.

    Source: Nichol & Dhariwal 2021, Eq. 18.
    """
    rms = kl.square().mean(0).sqrt()
    share = (1 - UNIFORM_SHARE) * rms / rms.sum().clamp(min=TINY) + UNIFORM_SHARE / max(len(rms), 1)
    return torch.cat([torch.zeros(1, dtype=torch.float64), share / share.sum()])


def prior_kl(schedule: Schedule, x_0: Tensor) -> Tensor:
    """KL( q(x_T | x_0) || N(0, I) ). Ho et al. 2020, Eq. 5, L_T."""
    alpha_bar = schedule.alpha_bar[-1]
    square = _mean(x_0.square())
    return 0.5 * (alpha_bar * square - alpha_bar - torch.log1p(-alpha_bar)) / math.log(2)


def posterior_kl(schedule: Schedule, x_0: Tensor, t: Tensor, x_0_hat: Tensor, log_variance: Tensor) -> Tensor:
    """KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ), t [B] in 1..T-1; at t = 0 q has no width.

    Both are Gaussians whose means, mu_tilde of x_0 and of x_0_hat, differ by a multiple of x_0 - x_0_hat. With the
    variance beta_tilde it is (snr_{t-1} - snr_t) / 2 times the squared error of x_0_hat.

    Source: Ho et al. 2020, Eqs. 5 and 7; Kingma et al. 2021, Eq. 13.
    """
    t = t.cpu()
    if bool((t < 1).any()):
        raise ValueError("t has a 0; it must be in 1..T-1")
    error = (x_0 - x_0_hat).square()
    error = _mean(error) if log_variance.ndim == 1 else error.cpu().double()
    log_q = gather(schedule.posterior_variance.log(), t, error)
    weight = gather(schedule.x_0_weight, t, error)
    kl = gaussian_kl(log_q, log_variance.cpu().double(), weight**2 * error)
    return kl.reshape(len(t), -1).mean(1) / math.log(2)


def decoder_nll(x_0: Tensor, x_0_hat: Tensor, log_variance: Tensor, x_0_max: float = 1.0) -> Tensor:
    """-log p(x_0 | x_t) at t = 0, of 8-bit images only. Ho et al. 2020, Eq. 13."""
    level = (x_0.cpu().double() / x_0_max + 1) * (LEVELS - 1) / 2
    if bool(((level - level.round()).abs() > 1e-3).any()) or level.min() < -0.5 or level.max() > LEVELS - 0.5:
        raise ValueError(
            f"x_0 is not made of {LEVELS} grey levels in [-{x_0_max:g}, {x_0_max:g}]; bits/dim are those of 8-bit "
            "images"
        )
    std = (0.5 * log_variance.cpu().double()).exp()
    std = broadcast(std, x_0) if std.ndim == 1 else std
    mean = x_0_hat.cpu().double() / x_0_max
    return -_mean(log_prob_of_level(level.round(), mean, std / x_0_max)) / math.log(2)


def _mean(values: Tensor) -> Tensor:
    """[B, C, H, W] as the mean of each image, float64 [B] on the CPU."""
    return values.flatten(1).mean(1).cpu().double()
