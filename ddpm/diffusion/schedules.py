"""Noise schedules: how much noise each of the T timesteps adds.

A schedule is defined by beta; all else follows from it. All tables are float64 [T] on the CPU, index t in 0..T-1, and
t = 0 already has one step of noise. Half of the table would vanish in half precision: callers compute in float64 and
round to float32 at the very end (`process.gather`). num_timesteps is T, at least 1; max_beta, in (0, 1), caps a last
beta that would be 1.

Papers:
    linear         Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
    scaled_linear  Rombach et al. 2022, Latent Diffusion, arXiv:2112.10752
    cosine         Nichol & Dhariwal 2021, Improved DDPM, arXiv:2102.09672
    sigmoid        Jabri et al. 2022, arXiv:2212.11972; Chen 2023, arXiv:2301.10972
    straight       Liu et al. 2022, Rectified Flow, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747
    geometric      Song et al. 2020, Score-Based Generative Modeling, arXiv:2011.13456 (VE)

Axes: T timesteps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_TIMESTEPS = 1_000_000
"""Largest T."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """beta_t over T steps, and the tables that follow from it. Ho et al. 2020, Eqs. 2, 4 and 7."""

    beta: Tensor
    """[T] float64, in (0, 1): the variance of the noise that step t adds."""

    def __post_init__(self) -> None:
        if self.beta.ndim != 1 or len(self.beta) < 1 or self.beta.dtype != torch.float64:
            got = f"{self.beta.dtype} of shape {tuple(self.beta.shape)}"
            raise ValueError(f"beta is {got}; it must be float64 [T] with T >= 1")
        if not bool(((self.beta > 0) & (self.beta < 1)).all()):
            low = self.beta.min().item()
            high = self.beta.max().item()
            raise ValueError(f"beta spans {low:g} to {high:g}; every beta must be in (0, 1)")
        first = self.alpha_bar[0].item()
        last = self.alpha_bar[-1].item()
        if not 0 < last <= first < 1:
            raise ValueError(f"beta takes alpha_bar from {first:g} to {last:g}; it must stay inside (0, 1)")

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.beta)

    @cached_property
    def alpha(self) -> Tensor:
        """1 - beta_t: the share of variance that step t keeps."""
        return 1 - self.beta

    @cached_property
    def alpha_bar(self) -> Tensor:
        """prod_{s <= t} alpha_s: the share of x_0's variance left in x_t; decreasing, in (0, 1)."""
        return self.alpha.cumprod(0)

    @cached_property
    def alpha_bar_prev(self) -> Tensor:
        """alpha_bar_{t-1}; 1 at t = 0."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])

    @cached_property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio, alpha_bar / (1 - alpha_bar); decreasing."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @cached_property
    def log_snr(self) -> Tensor:
        """log snr, natural logarithm."""
        return self.snr.log()

    @cached_property
    def sigma(self) -> Tensor:
        """Noise level relative to the signal, sqrt((1 - alpha_bar) / alpha_bar); increasing."""
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    @cached_property
    def posterior_variance(self) -> Tensor:
        """beta_tilde_t, the variance of q(x_{t-1} | x_t, x_0); 0 at t = 0. Ho et al. 2020, Eq. 7."""
        return (1 - self.alpha_bar_prev) / (1 - self.alpha_bar) * self.beta

    @cached_property
    def x_0_weight(self) -> Tensor:
        """sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t): the weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.alpha_bar_prev.sqrt() * self.beta / (1 - self.alpha_bar)


def linear(num_timesteps: int, beta_start: float, beta_end: float) -> Schedule:
    """beta rises linearly from `beta_start` to `beta_end`. Ho et al. 2020, Sec. 4: T = 1000, 1e-4, 0.02."""
    _check_betas(num_timesteps, beta_start, beta_end)
    return Schedule(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))


def scaled_linear(num_timesteps: int, beta_start: float, beta_end: float) -> Schedule:
    """sqrt(beta) rises linearly, so beta quadratically. Rombach et al. 2022: T = 1000, 0.00085, 0.012."""
    _check_betas(num_timesteps, beta_start, beta_end)
    root = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps, dtype=torch.float64)
    return Schedule(root**2)


def cosine(num_timesteps: int, cosine_s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """alpha_bar falls as a squared cosine: f(u) / f(0), f(u) = cos((u + s) / (1 + s) * pi / 2)^2.

    f reaches 0 at u = 1, so the last beta would be 1 and is capped at `max_beta`: at that step Algorithm 2 divides by
    sqrt(1 - 0.999), multiplying by 31.6. Sample with x_0_hat clipped.

    Args:
        cosine_s: s, an offset in [0, 1] that prevents a tiny first beta.

    Source: Nichol & Dhariwal 2021, Eq. 17.
    """
    s = cosine_s
    _check("cosine_s", s, 0 <= s <= 1, "[0, 1]")
    return _from_alpha_bar(lambda u: torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2, num_timesteps, max_beta)


def sigmoid(
    num_timesteps: int,
    sigmoid_start: float = -3.0,
    sigmoid_end: float = 3.0,
    sigmoid_tau: float = 1.0,
    max_beta: float = 0.999,
) -> Schedule:
    """alpha_bar falls as a logistic curve from start to end, rescaled to go from 1 to 0.

    With S the logistic function, alpha_bar(u) = (S(end / tau) - S((start + u (end - start)) / tau)) /
    (S(end / tau) - S(start / tau)). This is not the "sigmoid" of diffusers, in which beta itself is a
    logistic curve (GeoDiff).

    Args:
        sigmoid_start: argument of the logistic curve at u = 0, below `sigmoid_end`.
        sigmoid_end: argument at u = 1.
        sigmoid_tau: temperature, above 0; smaller is steeper.

    Source: Jabri et al. 2022; Chen 2023, Algorithm 1.
    """
    start = sigmoid_start
    end = sigmoid_end
    tau = sigmoid_tau
    _check("sigmoid_start", start, start < end, f"below sigmoid_end, which is {end}")
    _check("sigmoid_tau", tau, tau > 0, "(0, inf)")

    # S(b) - S(a) is proportional to tanh(b / 2) - tanh(a / 2), and the factor drops out of the ratio.
    def curve(u: Tensor) -> Tensor:
        return math.tanh(end / tau / 2) - torch.tanh((start + u * (end - start)) / tau / 2)

    return _from_alpha_bar(curve, num_timesteps, max_beta)


def straight(num_timesteps: int, max_beta: float = 0.999) -> Schedule:
    """The straight path of flow matching, (1 - u) x_0 + u eps, divided by its root mean square (1 - u)^2 + u^2.

    So sigma is u / (1 - u), and alpha_bar(u) = (1 - u)^2 / ((1 - u)^2 + u^2), which reaches 0: the last beta is capped.

    Source: Liu et al. 2022, Eq. 1; Lipman et al. 2022, Eq. 22.
    """
    return _from_alpha_bar(lambda u: (1 - u) ** 2 / ((1 - u) ** 2 + u**2), num_timesteps, max_beta)


def geometric(num_timesteps: int, sigma_min: float, sigma_max: float) -> Schedule:
    """sigma rises geometrically from `sigma_min` to `sigma_max`, so t is linear in EDM's c_noise = log(sigma) / 4.

    Source: Song et al. 2020, Eq. 9 and App. C; Karras et al. 2022 (EDM, arXiv:2206.00364) have 0.002 and 80.
    """
    _check("num_timesteps", num_timesteps, 1 <= num_timesteps <= MAX_TIMESTEPS, f"1, 2, ... {MAX_TIMESTEPS}")
    _check("sigma_min", sigma_min, 0 < sigma_min < sigma_max, f"(0, sigma_max), sigma_max being {sigma_max}")
    low = 2 * math.log(sigma_min)
    high = 2 * math.log(sigma_max)
    square = torch.logspace(low, high, num_timesteps, math.e, dtype=torch.float64)
    before = torch.cat([torch.zeros(1, dtype=torch.float64), square[:-1]])
    # 1 - alpha_bar_t / alpha_bar_{t-1}, without cancellation.
    return Schedule((square - before) / (1 + square))


def _from_alpha_bar(curve: Callable[[Tensor], Tensor], num_timesteps: int, max_beta: float) -> Schedule:
    """beta_t = 1 - curve((t + 1) / T) / curve(t / T), at most `max_beta`; `curve` need not begin at 1."""
    _check("num_timesteps", num_timesteps, 1 <= num_timesteps <= MAX_TIMESTEPS, f"1, 2, ... {MAX_TIMESTEPS}")
    _check("max_beta", max_beta, 0 < max_beta < 1, "(0, 1)")
    value = curve(torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64))
    return Schedule((1 - value[1:] / value[:-1]).clamp(max=max_beta))


def _check_betas(num_timesteps: int, beta_start: float, beta_end: float) -> None:
    _check("num_timesteps", num_timesteps, 1 <= num_timesteps <= MAX_TIMESTEPS, f"1, 2, ... {MAX_TIMESTEPS}")
    _check("beta_start", beta_start, 0 < beta_start < 1, "(0, 1)")
    _check(
        "beta_end", beta_end, beta_start <= beta_end < 1, f"[beta_start, 1), beta_start being {beta_start}"
    )


def _check(name: str, value: float, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value}; it must be in {allowed}")
