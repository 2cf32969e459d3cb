"""Samplers: from noise to images, one plain function each.

A sampler sees the net as `denoise(x_t, t) -> Denoised`, and takes randomness from `noise()` alone, so the caller
decides what an image depends on. With `PerImageNoise` image i is a function of its own seed, independent of the batch
and the device. All take, as far as they need it, and return [B, C, H, W], in [-1, 1] with a threshold:

    denoise    called once at each timestep, unless stated otherwise
    schedule   the one the net was trained with
    noise      standard normal; drawn once, and once a step by a sampler that is random
    timesteps  falling
    eta        in [0, 1]; 0 is deterministic, 1 is as noisy as `ancestral` with the variance beta_tilde
    threshold  keeps x_0_hat in the range of images (`guidance.clip`); None leaves it unchanged
    on_step    `on_step(step, x_t, x_0_hat)`, called in every step with its input and its prediction; the last x_0_hat
               is the image

Papers:
    ancestral  Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
    ddim       Song et al. 2021, Denoising Diffusion Implicit Models, arXiv:2010.02502
    dpmpp_2m   Lu et al. 2022, DPM-Solver++, arXiv:2211.01095; Xue et al. 2023, SA-Solver, arXiv:2309.05019
    heun       Karras et al. 2022, Elucidating the Design Space (EDM), arXiv:2206.00364
    mix        the Hugging Face diffusion course, unit 1

Axes: B batch, C channels, H W height and width, T timesteps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ddpm.diffusion import timesteps as spacings
from ddpm.diffusion.guidance import Denoise, Threshold, clip, predict
from ddpm.diffusion.process import posterior_mean, same_t
from ddpm.diffusion.reverse import learned_log_variance
from ddpm.diffusion.rng import Rng
from ddpm.diffusion.schedules import Schedule

Noise = Callable[[], Tensor]
"""Each call draws the next [B, C, H, W]: standard normal; for `mix` uniform in [-1, 1]."""

OnStep = Callable[[int, Tensor, Tensor], None]
"""on_step(step, x_t, x_0_hat): step counts from 0."""


class Sampler(Protocol):
    """A sampler with its settings fixed."""

    def __call__(self, denoise: Denoise, noise: Noise, on_step: OnStep | None = None) -> Tensor: ...


class PerImageNoise:
    """Noise in which image i, of `shape` (C, H, W), depends on generators[i] alone.

    `uniform` is for `mix`: uniform in [-1, 1), instead of standard normal.
    """

    def __init__(
        self,
        generators: Sequence[Rng],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        uniform: bool = False,
    ) -> None:
        self._generators = generators
        self._shape = shape
        self._device = device
        self._uniform = uniform

    def __call__(self) -> Tensor:
        """The next draw, [B, C, H, W] float32."""
        if self._uniform:
            return 2 * torch.stack([g.uniform(self._shape) for g in self._generators]).to(self._device) - 1
        return torch.stack([g.normal(self._shape) for g in self._generators]).to(self._device)


@torch.no_grad()
def ancestral(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    *,
    timesteps: Sequence[int],
    variance: Tensor | None,
    threshold: Threshold | None = clip,
    on_step: OnStep | None = None,
) -> Tensor:
    """Algorithm 2, along all timesteps or the shorter chain of some (`timesteps.respaced`).

    x_prev = mean + sqrt(variance) z, z = 0 at the last step.

    Args:
        variance: of the noise that each step of the chain adds, [n] float64 (`reverse.fixed_variance`); None: the one
            that the net learned.
        threshold: with a threshold, the mean is mu_tilde(x_0_hat, x_t), Eq. 7. None is exactly Algorithm 2; with the
            cosine schedule its first step multiplies every error by 31.6.

    Source: Ho et al. 2020, Algorithm 2, Eqs. 7 and 11.
    """
    chain = spacings.respaced(schedule, timesteps)
    if variance is not None and variance.shape != chain.beta.shape:
        raise ValueError(
            f"variance has shape {tuple(variance.shape)}; it must be [{len(timesteps)}], one per step"
        )
    x = noise()
    for step, t in enumerate(timesteps):
        x_0_hat, eps_hat, variance_mix = predict(denoise, schedule, x, t, threshold)
        k = len(timesteps) - 1 - step
        k_batch = same_t(k, x)
        if threshold is not None:
            x_prev = posterior_mean(chain, x_0_hat, x, k_batch)
        else:
            beta, alpha, alpha_bar = (float(a[k]) for a in (chain.beta, chain.alpha, chain.alpha_bar))
            x_prev = (x - beta / (1 - alpha_bar) ** 0.5 * eps_hat) / alpha**0.5
        if k > 0:
            if variance is not None:
                x_prev = x_prev + float(variance[k].sqrt()) * noise()
            else:
                x_prev = x_prev + (learned_log_variance(chain, k_batch, variance_mix) / 2).exp() * noise()
        if on_step is not None:
            on_step(step, x, x_0_hat)
        x = x_prev
    return x


@torch.no_grad()
def ddim(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    *,
    timesteps: Sequence[int],
    eta: float = 0.0,
    threshold: Threshold | None = clip,
    on_step: OnStep | None = None,
) -> Tensor:
    """A few steps along a subsequence of the timesteps; order 1 in the step, deterministic with eta = 0.

    x_prev = sqrt(alpha_bar_prev) x_0_hat + sqrt(1 - alpha_bar_prev - s^2) eps_hat + s z,
    s = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar_prev)

    The last step has alpha_bar_prev = 1, so s = 0 and it returns x_0_hat.

    Source: Song et al. 2021, Eqs. 12 and 16.
    """
    check_eta(eta)
    spacings.check(timesteps, schedule.num_timesteps)
    x = noise()
    for step, t in enumerate(timesteps):
        x_0_hat, eps_hat, _ = predict(denoise, schedule, x, t, threshold)
        last = step == len(timesteps) - 1
        alpha_bar = float(schedule.alpha_bar[t])
        alpha_bar_prev = 1.0 if last else float(schedule.alpha_bar[timesteps[step + 1]])
        variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        kept = max(0.0, 1 - alpha_bar_prev - variance)  # rounding can take it below 0 with eta = 1
        x_prev = alpha_bar_prev**0.5 * x_0_hat + kept**0.5 * eps_hat
        if eta > 0 and not last:
            x_prev = x_prev + variance**0.5 * noise()
        if on_step is not None:
            on_step(step, x, x_0_hat)
        x = x_prev
    return x


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    *,
    timesteps: Sequence[int],
    eta: float = 0.0,
    threshold: Threshold | None = clip,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M): order 2 at the cost of order 1, since it reuses the x_0_hat of the previous step.

    With lambda = -log sigma, h the step in lambda and r = h_before / h,
    D = (1 + 1 / (2 r)) x_0_hat - 1 / (2 r) x_0_hat_before
    x_prev / sqrt(alpha_bar_prev) = e^-((1 + eta) h) x / sqrt(alpha_bar) + (1 - e^-((1 + eta) h)) D
        + sigma_prev sqrt(1 - e^-(2 eta h)) z

    The first step has no previous step, and the last goes to sigma = 0, where h is infinite: for both D is x_0_hat, and
    the last returns it.

    eta = 0 solves the probability flow ODE. eta = 1 is SDE-DPM-Solver++(2M), in which every step replaces some of the
    noise, and so some of the net's errors; the first step is that of `ddim` with either. Any eta between solves, in
    y = x_t / sqrt(alpha_bar), an SDE of the same marginals,
    dy = (1 + eta) (x_0_hat - y) dlambda + sqrt(2 eta) sigma dw; in short steps it acts as eta^2 does in `ddim`.

    Source: Lu et al. 2022, Algorithm 2, and its section on diffusion SDEs for eta = 1; for the SDEs between,
    Xue et al. 2023, whose tau^2 is eta.
    """
    check_eta(eta)
    signal, sigma = _signal_and_sigma(schedule, timesteps)
    x = noise()
    before = None
    for step, t in enumerate(timesteps):
        x_0_hat = predict(denoise, schedule, x, t, threshold).x_0_hat
        shrink = sigma[step + 1] / sigma[step]  # e^-h
        kept = shrink ** (1 + eta)
        direction = x_0_hat
        if before is not None and shrink > 0:
            r = math.log(sigma[step - 1] / sigma[step]) / -math.log(shrink)
            direction = x_0_hat + (x_0_hat - before) / (2 * r)
        x_prev = signal[step + 1] * (kept / signal[step] * x + (1 - kept) * direction)
        if eta > 0 and shrink > 0:
            x_prev = x_prev + signal[step + 1] * sigma[step + 1] * (1 - shrink ** (2 * eta)) ** 0.5 * noise()
        if on_step is not None:
            on_step(step, x, x_0_hat)
        x = x_prev
        before = x_0_hat
    return x


@torch.no_grad()
def heun(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    *,
    timesteps: Sequence[int],
    threshold: Threshold | None = clip,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's method on the probability flow ODE: order 2, two calls of the net per step, one at the last.

    In y = x_t / sqrt(alpha_bar) the ODE is dy / dsigma = eps_hat. A step goes to the next sigma along eps_hat, calls
    the net there, and is repeated along the mean of both; the last, to sigma = 0, is Euler's and returns x_0_hat.

    The second eps_hat is used for the whole step, so sigma should not fall by orders of magnitude in one step, as the
    cosine schedule's does in the first of a few uniform steps: use `timesteps.karras` there.

    Source: Karras et al. 2022, Algorithm 1.
    """
    signal, sigma = _signal_and_sigma(schedule, timesteps)
    x = noise()
    for step, t in enumerate(timesteps):
        x_0_hat, eps_hat, _ = predict(denoise, schedule, x, t, threshold)
        if step == len(timesteps) - 1:
            x_prev = x_0_hat
        else:
            y = x / signal[step]
            dsigma = sigma[step + 1] - sigma[step]
            euler = signal[step + 1] * (y + dsigma * eps_hat)
            there = predict(denoise, schedule, euler, timesteps[step + 1], threshold).eps_hat
            x_prev = signal[step + 1] * (y + dsigma * (eps_hat + there) / 2)
        if on_step is not None:
            on_step(step, x, x_0_hat)
        x = x_prev
    return x


@torch.no_grad()
def mix(
    denoise: Denoise,
    noise: Noise,
    *,
    num_sample_steps: int,
    threshold: Threshold | None = clip,
    on_step: OnStep | None = None,
) -> Tensor:
    """The course's sampler: step i of n moves x by 1 / (n - i) of the way to the prediction.

    The amount of noise left, the second argument of `denoise`, falls evenly, 1, (n - 1) / n, ..., 1 / n, and the last
    step returns x_0_hat. `noise` is uniform in [-1, 1].
    """
    spacings.check_num_sample_steps(num_sample_steps)
    x = noise()
    for step in range(num_sample_steps):
        amount = torch.full((len(x),), 1 - step / num_sample_steps, device=x.device)
        x_0_hat = denoise(x, amount).x_0_hat
        if threshold is not None:
            x_0_hat = threshold(x_0_hat)
        if on_step is not None:
            on_step(step, x, x_0_hat)
        x = torch.lerp(x, x_0_hat, 1 / (num_sample_steps - step))
    return x


def check_eta(eta: float) -> None:
    """Raise ValueError if `eta` is not in [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be in [0, 1]")


def _signal_and_sigma(schedule: Schedule, timesteps: Sequence[int]) -> tuple[list[float], list[float]]:
    """sqrt(alpha_bar) and sigma at the timesteps and, after the last, of a clean image: 1 and 0."""
    spacings.check(timesteps, schedule.num_timesteps)
    chosen = list(timesteps)
    signal = schedule.alpha_bar[chosen].sqrt().tolist()
    sigma = schedule.sigma[chosen].tolist()
    return [*signal, 1.0], [*sigma, 0.0]
