"""Samplers: from noise to images, one plain function each.

A sampler sees the net as `denoise(x_t, t) -> Denoised`, and draws randomness from `noise()` alone, so that
who calls it decides what an image depends on. With `PerImageNoise` image i is a function of its own seed,
whatever the batch around it and whatever the device.

`on_step(step, x_t, x_0_hat)`, if given, is called in every step with what entered it and with the
prediction it used; the last x_0_hat is the image (with `mean="plain"` up to one step of noise).

Papers:
    ancestral  Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
    ddim       Song et al. 2021, Denoising Diffusion Implicit Models, arXiv:2010.02502
    guided     Ho & Salimans 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598
    mix        the Hugging Face diffusion course, unit 1

Axes: B batch, C channels, H W height and width, T timesteps.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Generator, Tensor

from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.process import posterior_mean, predict_eps_from_x_0
from ddpm.diffusion.schedules import Schedule

if TYPE_CHECKING:
    from ddpm.config import SampleConfig

Denoise = Callable[[Tensor, Tensor], Denoised]
"""denoise(x_t, t): t is [B] int64; for `mix` it is the amount of noise, [B] float in (0, 1]."""

Noise = Callable[[], Tensor]
"""Each call draws the next [B, C, H, W]: standard normal; for `mix` uniform in [-1, 1]."""

OnStep = Callable[[int, Tensor, Tensor], None]
"""on_step(step, x_t, x_0_hat): step counts from 0."""


class Sampler(Protocol):
    """A sampler with its settings fixed."""

    def __call__(self, denoise: Denoise, noise: Noise, on_step: OnStep | None = None) -> Tensor: ...


class PerImageNoise:
    """Noise of which image i depends on seeds[i] alone.

    Each image has a generator of its own, on the CPU whatever the device of the net.

    Args:
        seeds: one an image, each in [0, 2^64).
        shape: (C, H, W).
        device: where the noise is needed.
        uniform: uniform in [-1, 1) for `mix`, instead of standard normal.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        uniform: bool = False,
    ) -> None:
        self._generators = [Generator().manual_seed(seed) for seed in seeds]
        self._shape, self._device, self._uniform = shape, device, uniform

    def __call__(self) -> Tensor:
        """The next draw, [B, C, H, W] float32."""
        draw = torch.rand if self._uniform else torch.randn
        x = torch.stack([draw(self._shape, generator=g) for g in self._generators]).to(self._device)
        return 2 * x - 1 if self._uniform else x


@torch.no_grad()
def ancestral(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    *,
    mean: Literal["clipped", "plain"] = "clipped",
    variance: Literal["beta", "beta_tilde"] = "beta_tilde",
    on_step: OnStep | None = None,
) -> Tensor:
    """Algorithm 2: T steps back along the chain.

    x_{t-1} = mean + sqrt(variance_t) z, z = 0 at the last step.

    Args:
        denoise: at every t of the schedule.
        schedule: the one the net was trained with.
        noise: standard normal; drawn T times.
        mean: "clipped" is mu_tilde_t(x_0_hat clipped to [-1, 1], x_t), Eq. 7. "plain" is Algorithm 2 to the
            letter, the same without the clipping; with the cosine schedule its first step multiplies every
            error by 31.6.
        variance: "beta" is right for x_0 ~ N(0, I), "beta_tilde" (Eq. 7) for a single point x_0.
        on_step: sees every step.

    Returns:
        [B, C, H, W]; in [-1, 1] with the mean "clipped".

    Raises:
        ValueError: an unknown mean or variance.

    Source: Ho et al. 2020, Algorithm 2, Eqs. 7 and 11.
    """
    _check_choices(mean, variance)
    variances = schedule.beta if variance == "beta" else schedule.posterior_variance
    x = noise()
    for step, t in enumerate(reversed(range(schedule.num_timesteps))):
        t_batch = torch.full((len(x),), t, device=x.device)
        x_0_hat, eps_hat = denoise(x, t_batch)
        if mean == "clipped":
            x_0_hat = x_0_hat.clamp(-1, 1)
            x_prev = posterior_mean(schedule, x_0_hat, x, t_batch)
        else:
            beta, alpha, alpha_bar = (
                float(a[t]) for a in (schedule.beta, schedule.alpha, schedule.alpha_bar)
            )
            x_prev = (x - beta / (1 - alpha_bar) ** 0.5 * eps_hat) / alpha**0.5
        if t > 0:
            x_prev = x_prev + float(variances[t]) ** 0.5 * noise()
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
    num_sample_steps: int,
    eta: float = 0.0,
    clip_x_0: bool = True,
    on_step: OnStep | None = None,
) -> Tensor:
    """A few steps along a subsequence of the timesteps; order 1 in the step, deterministic with eta = 0.

    x_prev = sqrt(alpha_bar_prev) x_0_hat + sqrt(1 - alpha_bar_prev - s^2) eps_hat + s z,
    s = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar_prev)

    The last step has alpha_bar_prev = 1, so s = 0 and it returns x_0_hat.

    Args:
        denoise: at the timesteps of `ddim_timesteps`.
        schedule: the one the net was trained with.
        noise: standard normal; drawn once with eta = 0, else num_sample_steps times.
        num_sample_steps: in 1..T.
        eta: in [0, 1]; 0 is deterministic, 1 has the variance beta_tilde of `ancestral` (with all T steps).
        clip_x_0: clip x_0_hat to [-1, 1] and take the eps_hat that agrees with it, so that
            x_t = sqrt(alpha_bar) x_0_hat + sqrt(1 - alpha_bar) eps_hat still holds.
        on_step: sees every step.

    Returns:
        [B, C, H, W]; in [-1, 1] with clip_x_0.

    Raises:
        ValueError: num_sample_steps or eta is out of its range.

    Source: Song et al. 2021, Eqs. 12 and 16.
    """
    _check_eta(eta)
    timesteps = ddim_timesteps(schedule.num_timesteps, num_sample_steps)
    x = noise()
    for step, t in enumerate(timesteps):
        t_batch = torch.full((len(x),), t, device=x.device)
        x_0_hat, eps_hat = denoise(x, t_batch)
        if clip_x_0:
            x_0_hat = x_0_hat.clamp(-1, 1)
            eps_hat = predict_eps_from_x_0(schedule.alpha_bar, x, t_batch, x_0_hat)
        last = step == num_sample_steps - 1
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


def ddim_timesteps(num_timesteps: int, num_sample_steps: int) -> list[int]:
    """`num_sample_steps` timesteps from T - 1 down to 0, evenly spaced; one step is T - 1 alone.

    Both ends matter: above the first is noise no step has removed, below the last noise that stays.

    Raises:
        ValueError: num_sample_steps is not in 1..T.
    """
    _check_num_sample_steps(num_sample_steps, num_timesteps)
    if num_sample_steps == 1:
        return [num_timesteps - 1]
    return [
        round((num_timesteps - 1) * i / (num_sample_steps - 1)) for i in reversed(range(num_sample_steps))
    ]


@torch.no_grad()
def mix(
    denoise: Denoise,
    noise: Noise,
    *,
    num_sample_steps: int,
    clip_x_0: bool = True,
    on_step: OnStep | None = None,
) -> Tensor:
    """The course's sampler: in step i of n move 1 / (n - i) of the way from x to the prediction.

    So the amount of noise left falls evenly, 1, (n - 1) / n, ..., 1 / n, and the last step returns x_0_hat.

    Args:
        denoise: its second argument is the amount of noise left, float32 [B].
        noise: uniform in [-1, 1]; drawn once.
        num_sample_steps: n, at least 1.
        clip_x_0: clip x_0_hat to [-1, 1].
        on_step: sees every step.

    Returns:
        [B, C, H, W]; in [-1, 1] with clip_x_0.

    Raises:
        ValueError: num_sample_steps < 1.
    """
    _check_num_sample_steps(num_sample_steps)
    x = noise()
    for step in range(num_sample_steps):
        amount = torch.full((len(x),), 1 - step / num_sample_steps, device=x.device)
        x_0_hat = denoise(x, amount).x_0_hat
        if clip_x_0:
            x_0_hat = x_0_hat.clamp(-1, 1)
        if on_step is not None:
            on_step(step, x, x_0_hat)
        x = torch.lerp(x, x_0_hat, 1 / (num_sample_steps - step))
    return x


def guided(denoise_cond: Denoise, denoise_uncond: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance: eps_hat = uncond + scale (cond - uncond).

    At a given x_t, x_0_hat is affine in eps_hat, so the same combination of the two x_0_hat is the one that
    agrees with it.

    Args:
        denoise_cond: the net with labels.
        denoise_uncond: the net with the null label.
        scale: 0 is unconditional, 1 is conditional (as Imagen counts; Ho & Salimans write 1 + w), more
            trades variety for adherence to the label.

    Source: Ho & Salimans 2022, Eq. 6.
    """
    if scale == 1:
        return denoise_cond  # half the work

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        cond, uncond = denoise_cond(x_t, t), denoise_uncond(x_t, t)
        return Denoised(*(u + scale * (c - u) for c, u in zip(cond, uncond, strict=True)))

    return denoise


def build(config: "SampleConfig", schedule: Schedule) -> Sampler:
    """The sampler that `config` describes; `auto` must have been resolved, by the process, before.

    Its settings are checked here, not after hours of training at the first sample.

    Raises:
        ValueError: an unknown sampler, or a setting of it out of its range.
    """
    n, clip = config.num_sample_steps, config.clip_x_0
    match config.sampler:
        case "ancestral":
            _check_choices(config.mean, config.variance)
            return lambda denoise, noise, on_step=None: ancestral(
                denoise, schedule, noise, mean=config.mean, variance=config.variance, on_step=on_step
            )
        case "ddim":
            _check_eta(config.eta)
            _check_num_sample_steps(n, schedule.num_timesteps)
            return lambda denoise, noise, on_step=None: ddim(
                denoise, schedule, noise, num_sample_steps=n, eta=config.eta, clip_x_0=clip, on_step=on_step
            )
        case "mix":
            _check_num_sample_steps(n)
            return lambda denoise, noise, on_step=None: mix(
                denoise, noise, num_sample_steps=n, clip_x_0=clip, on_step=on_step
            )
        case _:
            raise ValueError(f"sampler is {config.sampler!r}; it must be ancestral, ddim or mix")


def _check_choices(mean: str, variance: str) -> None:
    if mean not in ("clipped", "plain"):
        raise ValueError(f"mean is {mean!r}; it must be clipped or plain")
    if variance not in ("beta", "beta_tilde"):
        raise ValueError(f"variance is {variance!r}; it must be beta or beta_tilde")


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be in [0, 1]")


def _check_num_sample_steps(num_sample_steps: int, most: int | None = None) -> None:
    if not 1 <= num_sample_steps <= (most or num_sample_steps):
        allowed = f"1..{most}, the timesteps of the schedule" if most else "1, 2, ..."
        raise ValueError(f"num_sample_steps is {num_sample_steps}; it must be in {allowed}")
