"""Denoising at equal noise, independent of the schedule: the error of x_0_hat over log SNR.

Two schedules visit different noise levels in different proportions, so their losses are not comparable. At one level
they are: half the integral of this curve over snr is, in continuous time, the bound's sum of KL_t in nats per dimension
(Kingma et al. 2021, Eq. 17). The sum over T steps is larger.

Papers:
    Kingma et al. 2021, Variational Diffusion Models, arXiv:2107.00630

Axes: B batch, C channels, H W height and width, T timesteps, L noise levels.
"""

import torch
from torch import Tensor

from ddpm.diffusion.denoisers import Denoise
from ddpm.diffusion.likelihood import x_0_error_at
from ddpm.diffusion.samplers import Noise
from ddpm.diffusion.schedules import Schedule


@torch.no_grad()
def error_at(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    noise: Noise,
    log_snr: Tensor,
    *,
    clip_x_0: bool = True,
) -> Tensor:
    """The squared error of x_0_hat at given noise levels, each image's mean over its dimensions.

    Between the two timesteps next to a level the error is interpolated linearly in log SNR; both use the same noise.

    Args:
        denoise: at every t of the schedule.
        schedule: the one the net was trained with.
        x_0: [B, C, H, W].
        noise: standard normal [B, C, H, W]; drawn once per level, so that equal seeds give all schedules equal noise.
        log_snr: [L] float64, natural logarithm.
        clip_x_0: clip x_0_hat to [-1, 1], as samplers do.

    Returns:
        [B, L] float64 on the CPU; nan at levels that the schedule does not reach.
    """
    of_t, columns = schedule.log_snr, []
    for level in log_snr.tolist():
        eps = noise()
        if not of_t[-1] <= level <= of_t[0]:
            columns.append(torch.full((len(x_0),), torch.nan, dtype=torch.float64))
            continue
        after = int((of_t > level).sum().clamp(1, len(of_t) - 1))  # the first timestep at the level or beyond
        low, high = of_t[after].item(), of_t[after - 1].item()
        share = (high - level) / (high - low)
        first, second = (x_0_error_at(denoise, schedule, x_0, t, eps, clip_x_0) for t in (after - 1, after))
        columns.append((1 - share) * first + share * second)
    return torch.stack(columns, 1)
