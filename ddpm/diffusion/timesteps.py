"""The timesteps that a sampler visits out of T, and the shorter chain that they form.

A spacing is a list of n = num_sample_steps distinct timesteps, n in 1..T, from T - 1 (or one whose sigma is so large
that it makes little difference) down to 0, or to the one whose sigma is sigma_min. Both ends matter: noise above the
first timestep is never removed, and noise below the last one stays. With one step only the first timestep is visited.

Papers:
    quadratic  Song et al. 2021, Denoising Diffusion Implicit Models, arXiv:2010.02502
    karras     Karras et al. 2022, Elucidating the Design Space (EDM), arXiv:2206.00364
    respaced   Nichol & Dhariwal 2021, Improved DDPM, arXiv:2102.09672

Axes: T timesteps; D = C H W numbers per image.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from ddpm.diffusion.schedules import Schedule

SIGMA_MAX = 10.0
"""Start of karras, in units of sqrt(D).

The mean of an image stands out of the noise of its D numbers by sqrt(D) / sigma. If sampling starts from pure noise,
images with means from N(m, s^2) come out with means m s sqrt(D) / sigma too small. For N(0.6, 0.1^2) that is 0.006 with
10, less than a grey level; with sigma = 80 it is 0.083 at 64x64 in colour. The cost is steps at large noise.
"""


def uniform(num_timesteps: int, num_sample_steps: int) -> list[int]:
    """Evenly spaced in t."""
    check_num_sample_steps(num_sample_steps, num_timesteps)
    return _distinct(_falling(num_timesteps - 1, num_sample_steps), num_timesteps)


def quadratic(num_timesteps: int, num_sample_steps: int) -> list[int]:
    """Evenly spaced in sqrt(t): short steps where little noise is left. Song et al. 2021, App. D.2."""
    check_num_sample_steps(num_sample_steps, num_timesteps)
    return _distinct([(num_timesteps - 1) * u**2 for u in _falling(1, num_sample_steps)], num_timesteps)


def karras(
    schedule: Schedule, num_sample_steps: int, rho: float = 7.0, sigma_max: float = 80.0, sigma_min: float = 0
) -> list[int]:
    """Evenly spaced in sigma^(1 / rho) from `sigma_max` down, each rounded to the timestep nearest in log sigma.

    The first is rounded up instead, so that no more of an image is visible than at sigma_max. (The cosine schedule
    reaches 20,000, and would spend most steps on the way down.) Where several round to one timestep, its neighbours are
    taken.

    Args:
        rho: in [1, inf). 1 is evenly spaced in sigma; a larger rho takes more steps at little noise.
        sigma_max: in (0, inf], for images of D numbers SIGMA_MAX sqrt(D): 80 if D = 64. Where the schedule does not
            reach it, T - 1 is first.
        sigma_min: in [0, sigma_max), of the last timestep; below the schedule's smallest, that is 0. A net whose loss
            hardly weighs small noise (min_snr) leaves some in every step there, and more steps leave more.

    Source: Karras et al. 2022, Eq. 5; its Table 1 has sigma_max = 80.
    """
    check_num_sample_steps(num_sample_steps, schedule.num_timesteps)
    if not 1 <= rho < float("inf"):
        raise ValueError(f"rho is {rho}; it must be in [1, inf)")
    if not sigma_max > 0:
        raise ValueError(f"sigma_max is {sigma_max}; it must be in (0, inf]")
    top = min(schedule.sigma[-1].item(), sigma_max)
    if not 0 <= sigma_min < top:
        raise ValueError(f"sigma_min is {sigma_min}; it must be in [0, {top:g}), below the first step's")
    low = max(schedule.sigma[0].item(), sigma_min) ** (1 / rho)
    high = top ** (1 / rho)
    root = low + (high - low) * torch.tensor(_falling(1, num_sample_steps), dtype=torch.float64)
    nearest = (rho * root.log()[:, None] - schedule.sigma.log()).abs().argmin(1)
    first = int((schedule.sigma < top).sum())
    return _distinct([first, *nearest.tolist()[1:]], schedule.num_timesteps)


def respaced(schedule: Schedule, timesteps: Sequence[int]) -> Schedule:
    """The chain that visits only `timesteps`: its step k jumps between two of them.

    beta_k = 1 - alpha_bar[t_k] / alpha_bar[t_{k-1}], k counted from the cleanest; so alpha_bar_k is
    alpha_bar[t_k], and the posterior of Ho et al. 2020, Eq. 7 is that of the jump. With all T steps it is
    the schedule itself.

    Source: Nichol & Dhariwal 2021, Sec. 4.
    """
    check(timesteps, schedule.num_timesteps)
    if len(timesteps) == schedule.num_timesteps:
        return schedule
    alpha_bar = schedule.alpha_bar[list(reversed(timesteps))]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return Schedule(1 - alpha_bar / before)


def spaced(
    schedule: Schedule,
    num_sample_steps: int,
    *,
    spacing: str,
    rho: float,
    sigma_max: float,
    sigma_min: float,
) -> list[int]:
    """The timesteps by the name of their spacing; the last three arguments are those of `karras`."""
    match spacing:
        case "uniform":
            return uniform(schedule.num_timesteps, num_sample_steps)
        case "quadratic":
            return quadratic(schedule.num_timesteps, num_sample_steps)
        case "karras":
            return karras(schedule, num_sample_steps, rho, sigma_max, sigma_min)
        case _:
            raise ValueError(f"spacing is {spacing!r}; it must be uniform, quadratic or karras")


def spaced_for_heun(
    schedule: Schedule,
    num_sample_steps: int,
    *,
    spacing: str,
    rho: float,
    sigma_max: float,
    sigma_min: float,
) -> list[int]:
    """`spaced`, with the first timestep of `karras` rounded down.

    Heun's first step must not go down by orders of magnitude (see `samplers.heun`), as from 1825 to 58 with sigmoid.
    """
    below = schedule.sigma[schedule.sigma <= sigma_max]
    if len(below) > 0:
        sigma_max = below[-1].item()
    return spaced(
        schedule, num_sample_steps, spacing=spacing, rho=rho, sigma_max=sigma_max, sigma_min=sigma_min
    )


def check(timesteps: Sequence[int], num_timesteps: int) -> None:
    """Raise ValueError if `timesteps` are not distinct, falling and in 0..T-1, or if there is none."""
    falling = all(a > b for a, b in pairwise(timesteps))
    if not timesteps or not falling or timesteps[-1] < 0 or timesteps[0] >= num_timesteps:
        raise ValueError(f"timesteps are {list(timesteps)}; they must fall, within {num_timesteps - 1}..0")


def check_num_sample_steps(num_sample_steps: int, num_timesteps: int | None = None) -> None:
    """Raise ValueError if `num_sample_steps` is not in 1..num_timesteps."""
    if not 1 <= num_sample_steps <= (num_timesteps or num_sample_steps):
        allowed = f"1..{num_timesteps}, the timesteps of the schedule" if num_timesteps else "1, 2, ..."
        raise ValueError(f"num_sample_steps is {num_sample_steps}; it must be in {allowed}")


def _falling(top: float, n: int) -> list[float]:
    """n numbers from `top` to 0, evenly spaced; `top` alone for n = 1."""
    return [top * i / (n - 1) for i in reversed(range(n))] if n > 1 else [top]


def _distinct(wanted: Sequence[float], num_timesteps: int) -> list[int]:
    """`wanted`, at most T falling numbers, as distinct whole timesteps; where two coincide the later one moves down."""
    timesteps: list[int] = []
    above = num_timesteps
    for i, t in enumerate(wanted):
        above = max(min(round(t), above - 1), len(wanted) - 1 - i)  # leaves room for the later ones
        timesteps.append(above)
    return timesteps
