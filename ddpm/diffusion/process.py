"""The forward process, its posterior, and the relations between x_t, x_0, eps and v.

Nothing here draws noise: the caller gives it. Tables are float64; a coefficient is computed in float64 and rounded to
the images' float32 last. Half precision is refused: with bfloat16 tables several timesteps carry exactly no noise.
Results have the shape and dtype of the images:

    alpha_bar  [T] float64, decreasing, in (0, 1)
    x_0        [B, C, H, W], clean images in [-1, 1], or a prediction of them
    x_t        [B, C, H, W]; it may leave [-1, 1]
    eps        [B, C, H, W], standard normal
    t          [B] int64 in [0, T); t = 0 already has one step of noise

Papers:
    Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
    Salimans & Ho 2022, Progressive Distillation (v), arXiv:2202.00512
    `mix`: the Hugging Face diffusion course, unit 1

Axes: B batch, C channels, H W height and width, T timesteps.
"""

import torch
from torch import Tensor

from ddpm.diffusion.schedules import Schedule


def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t] of a table [T] float64, with the dtype and device of the images `like`, shaped [B, 1, 1, ...]."""
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"images are {like.dtype}; diffusion needs float32 or float64 (autocast only the net)"
        )
    if t.shape != like.shape[:1] or t.dtype != torch.int64:
        raise ValueError(f"t is {t.dtype} {tuple(t.shape)}; it must be int64 ({len(like)},), one per image")
    # Rounded before the move: some devices have no float64.
    return broadcast(table.to(like.dtype).to(like.device, non_blocking=True)[t], like)


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """`values` [B], shaped [B, 1, 1, ...] to multiply the images `like`."""
    ones = [1] * (like.ndim - 1)
    return values.view(-1, *ones)


def same_t(t: int, like: Tensor) -> Tensor:
    """[B] int64: t for each of the images `like`."""
    return torch.full((len(like),), t, device=like.device)


def q_sample(alpha_bar: Tensor, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, from q(x_t | x_0) in one jump. Ho et al. 2020, Eq. 4."""
    _check_shapes("eps", eps, "x_0", x_0)
    signal, noise = _signal_and_noise(alpha_bar, t, x_0)
    return signal * x_0 + noise * eps


def predict_x_0_from_eps(alpha_bar: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar). Ho et al. 2020, Eq. 15.

    An error in eps is multiplied by sigma_t, which at the last t can be thousands.
    """
    _check_shapes("eps", eps, "x_t", x_t)
    signal, noise = _signal_and_noise(alpha_bar, t, x_t)
    return (x_t - noise * eps) / signal


def predict_eps_from_x_0(alpha_bar: Tensor, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar): the inverse of Ho et al. 2020, Eq. 15."""
    _check_shapes("x_0", x_0, "x_t", x_t)
    signal, noise = _signal_and_noise(alpha_bar, t, x_t)
    return (x_t - signal * x_0) / noise


def v_from(alpha_bar: Tensor, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0. Salimans & Ho 2022, Sec. 4."""
    _check_shapes("eps", eps, "x_0", x_0)
    signal, noise = _signal_and_noise(alpha_bar, t, x_0)
    return signal * eps - noise * x_0


def predict_x_0_from_v(alpha_bar: Tensor, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v. Salimans & Ho 2022, App. D."""
    _check_shapes("v", v, "x_t", x_t)
    signal, noise = _signal_and_noise(alpha_bar, t, x_t)
    return signal * x_t - noise * v


def predict_eps_from_v(alpha_bar: Tensor, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """eps = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v: (x_0, eps) is (x_t, v) turned by an angle."""
    _check_shapes("v", v, "x_t", x_t)
    signal, noise = _signal_and_noise(alpha_bar, t, x_t)
    return noise * x_t + signal * v


def posterior_mean(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """mu_tilde_t, the mean of q(x_{t-1} | x_t, x_0); at t = 0 it is x_0 itself. Ho et al. 2020, Eq. 7.

    mu_tilde_t = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
               + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t
    """
    _check_shapes("x_0", x_0, "x_t", x_t)
    s = schedule
    of_x_t = s.alpha.sqrt() * (1 - s.alpha_bar_prev) / (1 - s.alpha_bar)
    return gather(s.x_0_weight, t, x_t) * x_0 + gather(of_x_t, t, x_t) * x_t


def mix(x_0: Tensor, amount: Tensor, u: Tensor) -> Tensor:
    """The course's corruption: x_t = (1 - amount) x_0 + amount u, amount [B] in [0, 1].

    The course has x_0 and u in [0, 1]; here both are in [-1, 1], u uniform. The map x -> 2 x - 1 commutes with the
    mixture, so the two differ only in the unit of x.
    """
    _check_shapes("u", u, "x_0", x_0)
    amount = broadcast(amount.to(x_0.dtype), x_0)
    return (1 - amount) * x_0 + amount * u


def _signal_and_noise(alpha_bar: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar[t]) and sqrt(1 - alpha_bar[t]), subtracted and rooted in float64."""
    return gather(alpha_bar.sqrt(), t, like), gather((1 - alpha_bar).sqrt(), t, like)


def _check_shapes(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        got = tuple(value.shape)
        right = tuple(other.shape)
        raise ValueError(f"{name} has shape {got}; it must have that of {other_name}, {right}")
