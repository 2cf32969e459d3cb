"""The error of x_0_hat over log SNR: known answers, and independence of the schedule."""

import math

import pytest
import torch
from support.exact_denoisers import gaussian, normal

from ddpm.diffusion import likelihood, schedules
from ddpm.diffusion.denoising import error_at

STD = 0.5
LEVELS = torch.linspace(-4, 4, 9, dtype=torch.float64)
SCHEDULES = {
    "linear": schedules.linear(1000, 1e-4, 0.02),
    "cosine": schedules.cosine(400),
    "sigmoid": schedules.sigmoid(600),
}


def curve(schedule, seed=0, levels=LEVELS):
    x_0 = STD * normal((64, 1, 8, 8), seed=9)()
    denoise = gaussian(schedule, 0.0, STD)
    return error_at(denoise, schedule, x_0, normal((64, 1, 8, 8), seed), levels, clip_x_0=False)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_error_of_gaussian_data_is_the_posterior_variance(name):
    """Var(x_0 | x_t) = v / (1 + v snr), whatever the schedule."""
    found = curve(SCHEDULES[name]).mean(0)
    assert torch.allclose(found, STD**2 / (1 + STD**2 * LEVELS.exp()), rtol=0.03)


def test_schedules_differ_only_by_interpolation():
    """The same noise at the same level: image by image the curves of an exact denoiser agree."""
    linear, cosine, sigmoid = map(curve, SCHEDULES.values())
    assert linear.shape == (64, 9)
    assert torch.allclose(linear, cosine, rtol=0.01) and torch.allclose(linear, sigmoid, rtol=0.01)
    assert not torch.allclose(linear, curve(SCHEDULES["linear"], seed=1), rtol=0.01)


def test_half_the_integral_over_snr_is_the_sum_of_the_bound():
    """In nats per dimension; for N(0, v) both are log((1 + v snr_0) / (1 + v snr_T)) / 2.

    The sum is above the integral, by half a step of log SNR (0.004) here, and by 11 % in 1,000 steps of `linear`.
    """
    levels = torch.linspace(7, -7, 1751, dtype=torch.float64)
    alpha_bar = levels.sigmoid()
    fine = schedules.Schedule(1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]))
    known = 0.5 * (torch.log1p(STD**2 * fine.snr[0]) - torch.log1p(STD**2 * fine.snr[-1])).item()

    levels = fine.log_snr[::10]
    error, snr = curve(fine, levels=levels).mean(0), levels.exp()
    assert -0.5 * torch.trapezoid(error, snr).item() == pytest.approx(known, rel=0.01)

    eight_bit = (
        (STD * normal((64, 1, 8, 8), seed=9)().float())
        .add(1)
        .mul(127.5)
        .round()
        .div(127.5)
        .sub(1)
        .clamp(-1, 1)
    )
    noise = normal((64, 1, 8, 8), dtype=torch.float32)
    bound = likelihood.exact(gaussian(fine, 0.0, STD), fine, eight_bit, noise, clip_x_0=False)
    assert bound.kl.sum(1).mean().item() * math.log(2) == pytest.approx(known, rel=0.02)


def test_levels_outside_the_schedule_are_nan():
    short = schedules.linear(10, 1e-3, 0.02)  # log SNR from 6.9 to 2.2
    found = curve(short, levels=torch.tensor([9.0, 6.9, 3.0, 2.0], dtype=torch.float64))
    assert found.isnan().all(0).tolist() == [True, False, False, True]
    ends = short.log_snr[[0, -1]]
    assert not curve(short, levels=ends).isnan().any()
