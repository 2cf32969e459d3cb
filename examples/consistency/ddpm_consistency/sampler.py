"""The sampler of a consistency net, and its timesteps.

Paper: Song et al. 2023, Consistency Models, arXiv:2303.01469

Axes: B batch, C channels, H W height and width, T timesteps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm.diffusion import timesteps as spacings
from ddpm.diffusion.guidance import Denoise, Threshold, clip, predict
from ddpm.diffusion.process import q_sample, same_t
from ddpm.diffusion.samplers import Noise, OnStep
from ddpm.diffusion.schedules import Schedule


@torch.no_grad()
def multistep(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    *,
    timesteps: Sequence[int],
    threshold: Threshold | None = clip,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sampling from a consistency net: x_0_hat, noised to the next timestep with new noise, and so on.

    Source: Song et al. 2023, Algorithm 1.
    """
    spacings.check(timesteps, schedule.num_timesteps)
    x_0_hat = None
    for step, t in enumerate(timesteps):
        x = noise()
        if x_0_hat is not None:
            x = q_sample(schedule.alpha_bar, x_0_hat, same_t(t, x), x)
        x_0_hat = predict(denoise, schedule, x, t, threshold).x_0_hat
        if on_step is not None:
            on_step(step, x, x_0_hat)
    assert x_0_hat is not None, "there is a timestep"
    return x_0_hat


def spaced_before_the_last(
    schedule: Schedule, num_sample_steps: int, *, spacing: str, **settings: float
) -> list[int]:
    """`ddpm.diffusion.timesteps.spaced`, but of `uniform` the first n of n + 1 timesteps.

    For `multistep`, which reaches a clean image from any timestep, and need not visit the last one.
    """
    if spacing == "uniform":
        spacings.check_num_sample_steps(num_sample_steps, schedule.num_timesteps)
        one_more = min(num_sample_steps + 1, schedule.num_timesteps)
        return spacings.uniform(schedule.num_timesteps, one_more)[:num_sample_steps]
    return spacings.spaced(schedule, num_sample_steps, spacing=spacing, **settings)
