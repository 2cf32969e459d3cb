"""Denoisers that are exact for simple data distributions, and one arbitrary denoiser."""

import torch

from ddpm.diffusion import process
from ddpm.diffusion.objectives import Denoised


def denoiser_from_x_0(schedule, predict):
    """Build a denoiser from a function x_0_hat = predict(x_t, alpha_bar[t])."""

    def denoise(x_t, t):
        x_0_hat = predict(x_t, schedule.alpha_bar[t].view(-1, 1, 1, 1).to(x_t.dtype))
        return Denoised(x_0_hat, process.predict_eps_from_x_0(schedule.alpha_bar, x_t, t, x_0_hat))

    return denoise


def gaussian(schedule, mean, std):
    """The exact denoiser of data from N(mean, std^2): x_0 and x_t are jointly normal."""

    def predict(x_t, alpha_bar):
        gain = alpha_bar.sqrt() * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        return mean + gain * (x_t - alpha_bar.sqrt() * mean)

    return denoiser_from_x_0(schedule, predict)


def finite(schedule, points):
    """The exact denoiser of a finite data set [N, C, H, W]: the mean of its points, weighted by the posterior."""

    def predict(x_t, alpha_bar):
        distance = (x_t[:, None] - alpha_bar[:, None].sqrt() * points).square().flatten(2).sum(2)
        posterior = (-distance / (2 * (1 - alpha_bar.flatten(1)))).softmax(1)
        return torch.einsum("bn,nchw->bchw", posterior, points)

    return denoiser_from_x_0(schedule, predict)


def toy_denoiser(schedule):
    """A denoiser with a made-up eps_hat, large enough that x_0_hat is sometimes clipped."""

    def denoise(x_t, t):
        eps_hat = 2 * torch.tanh(x_t.roll(1, 3) - 0.5 * x_t + t.view(-1, 1, 1, 1) / 50)
        return Denoised(process.predict_x_0_from_eps(schedule.alpha_bar, x_t, t, eps_hat), eps_hat)

    return denoise


def normal(shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=dtype)


def correlated(schedule, covariance):
    """The exact denoiser of images [B, 1, 1, N] from N(0, covariance [N, N])."""
    a = schedule.alpha_bar.view(-1, 1, 1)
    gain = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(len(covariance)))

    def denoise(x_t, t):
        x_0_hat = (gain[t] @ x_t.flatten(1)[:, :, None]).view_as(x_t)
        return Denoised(x_0_hat, process.predict_eps_from_x_0(schedule.alpha_bar, x_t, t, x_0_hat))

    return denoise
