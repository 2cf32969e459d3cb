"""The reverse process p(x_{t-1} | x_t): its variance, and the KL divergence of a step from q(x_{t-1} | x_t, x_0).

Both are Gaussians. The mean of p is that of q with x_0_hat in place of x_0 (`process.posterior_mean`). Its variance is

    beta        beta_t: right for x_0 ~ N(0, I)
    beta_tilde  that of q: right for a single point x_0
    measured    beta_tilde_t + w_t^2 E|x_0 - x_0_hat|^2 / D, w_t the weight of x_0 in the mean of q: the variance with
                the least KL divergence among those that are the same for every image and pixel
    learned     between beta_tilde and beta, predicted by the net for every pixel

With fewer steps the bound gets worse for any net: most with beta_tilde, less with beta, least with measured, where an
optimal denoiser loses little and what is lost is the net's (benchmarks/honesty.md).

At t = 0, where beta_tilde is 0, p is the decoder: beta and beta_tilde are beta_tilde_1 there, as in the code of Ho et
al., and the measured variance is at least that of rounding to grey levels.

Papers:
    Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
    Nichol & Dhariwal 2021, Improved DDPM, arXiv:2102.09672 (learned)
    Bao et al. 2022, Analytic-DPM, arXiv:2201.06503 (measured)

Axes: B batch, C channels, H W height and width, T timesteps, D = C H W.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ddpm.diffusion.process import broadcast, gather
from ddpm.diffusion.schedules import Schedule

LEVELS = 256
"""Grey levels of an image."""
ROUNDING = (2 / (LEVELS - 1)) ** 2 / 12
"""Variance of the rounding to grey levels in [-1, 1]."""

ReverseVariance = Literal["beta", "beta_tilde", "measured", "learned"]


def fixed_variance(
    schedule: Schedule, variance: str, x_0_error: Tensor | None = None, x_0_max: float = 1.0
) -> Tensor:
    """The variance of p at every t, [T] float64, above 0.

    Args:
        variance: a `ReverseVariance`, not "learned".
        x_0_error: for "measured", [T] float64: the mean squared error of x_0_hat over images and dimensions.
        x_0_max: the largest grey level.

    Source: Ho et al. 2020, Sec. 3.2; Bao et al. 2022, Theorem 1, with the error of this net in place of that of the
    best one.
    """
    match variance:
        case "beta":
            return torch.cat([_beta_tilde(schedule)[:1], schedule.beta[1:]])
        case "beta_tilde":
            return _beta_tilde(schedule)
        case "measured" if x_0_error is not None:
            measured = schedule.posterior_variance + schedule.x_0_weight**2 * x_0_error
            return torch.cat([measured[:1].clamp(min=ROUNDING * x_0_max**2), measured[1:]])
        case "measured":
            raise ValueError("variance is 'measured'; that needs the error of x_0_hat, measured with the net")
    raise ValueError(f"variance is {variance!r}; it must be beta, beta_tilde or measured")


def learned_log_variance(schedule: Schedule, t: Tensor, variance_mix: Tensor | None) -> Tensor:
    """mix log beta_t + (1 - mix) log beta_tilde_t, shaped as the mix [B, C, H, W]. Nichol & Dhariwal 2021, Eq. 15."""
    if variance_mix is None:
        raise ValueError(
            "variance is 'learned', but this net did not learn it; use beta, beta_tilde or measured"
        )
    low = gather(_beta_tilde(schedule).log(), t, variance_mix)
    high = gather(schedule.beta.log(), t, variance_mix)
    return variance_mix * high + (1 - variance_mix) * low


def gaussian_kl(log_q: Tensor, log_p: Tensor, squared_difference: Tensor) -> Tensor:
    """KL( N(., q) || N(., p) ) in nats, from the logarithms of the variances and the squared distance of the means."""
    difference = log_q - log_p
    return 0.5 * (difference.exp() - 1 - difference + squared_difference * (-log_p).exp())


def step_bits(
    schedule: Schedule,
    x_0: Tensor,
    x_0_hat: Tensor,
    t: Tensor,
    log_variance: Tensor,
    x_0_max: float = 1.0,
) -> Tensor:
    """The term of the bound that belongs to step t [B]: KL(q || p), and at t = 0 -log p(x_0 | x_1); [B] in bits/dim.

    It is differentiable: everything is on the device and in the dtype of x_0, 8-bit images in [-x_0_max, x_0_max].
    x_0_hat and log_variance, of p, are [B, C, H, W].

    Source: Ho et al. 2020, Eqs. 5 and 13; Nichol & Dhariwal 2021, Eqs. 4 to 7.
    """
    log_q = gather(_beta_tilde(schedule).log(), t, x_0)
    weight = gather(schedule.x_0_weight, t, x_0)
    kl = gaussian_kl(log_q, log_variance, (weight * (x_0 - x_0_hat)).square())
    # The unused branch must be finite: a non-finite gradient times 0 is not 0.
    is_first = broadcast(t == 0, x_0)
    mean = torch.where(is_first, x_0_hat, x_0)
    std = torch.where(is_first, 0.5 * log_variance, 0).exp()
    level = ((x_0 / x_0_max + 1) * (LEVELS - 1) / 2).round()
    nll = -log_prob_of_level(level, mean / x_0_max, std / x_0_max)
    return torch.where(is_first, nll, kl).flatten(1).mean(1) / math.log(2)


def log_prob_of_level(level: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log of the mass that N(mean, std^2) has on a grey level, a whole number in 0..255, of images in [-1, 1]; in nats.

    Level i is the interval of width 2 / 255 around i / 127.5 - 1; the outermost two extend to infinity. Far from the
    mean, where the difference of two distribution functions would be 0, it is computed from their logarithms.

    Source: Ho et al. 2020, Eq. 13.
    """
    lower = ((level - 0.5) * 2 / (LEVELS - 1) - 1 - mean) / std
    upper = ((level + 0.5) * 2 / (LEVELS - 1) - 1 - mean) / std
    lower = lower.masked_fill(level == 0, -math.inf)
    upper = upper.masked_fill(level == LEVELS - 1, math.inf)
    # Intervals above the mean are mirrored: log_ndtr is precise only in the lower tail.
    above = lower + upper > 0
    tail_lower = torch.where(above, -upper, lower)
    tail_upper = torch.where(above, -lower, upper)
    log_upper = torch.special.log_ndtr(tail_upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(tail_lower) - log_upper))


def _beta_tilde(schedule: Schedule) -> Tensor:
    """[T] float64: beta_tilde; at t = 0 its value at t = 1; with T = 1, beta."""
    after = schedule.posterior_variance[1:]
    return torch.cat([after[:1] if len(after) else schedule.beta, after])
