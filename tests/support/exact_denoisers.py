"""Problems with known answers: exact denoisers of simple data, one arbitrary denoiser, and what runs them."""

import torch

from ddpm.diffusion import process, samplers
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.reverse import fixed_variance
from ddpm.diffusion.timesteps import respaced


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


def gaussian_errors(schedule, std):
    """E(x_0 - x_0_hat)^2 of `gaussian`, [T]."""
    return std**2 * (1 - schedule.alpha_bar) / (schedule.alpha_bar * std**2 + 1 - schedule.alpha_bar)


def finite(schedule, points):
    """The exact denoiser of a finite data set [N, C, H, W]: the mean of its points, weighted by the posterior."""

    def predict(x_t, alpha_bar):
        distance = (x_t[:, None] - alpha_bar[:, None].sqrt() * points).square().flatten(2).sum(2)
        posterior = (-distance / (2 * (1 - alpha_bar.flatten(1)))).softmax(1)
        return torch.einsum("bn,nchw->bchw", posterior, points)

    return denoiser_from_x_0(schedule, predict)


def black_and_white():
    """A finite data set of four 4x4 images."""
    g = torch.Generator().manual_seed(3)
    return (2 * torch.rand((4, 1, 4, 4), generator=g, dtype=torch.float64) - 1).sign()


def correlated(schedule, covariance):
    """The exact denoiser of images [B, 1, 1, N] from N(0, covariance [N, N])."""
    a = schedule.alpha_bar.view(-1, 1, 1)
    gain = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(len(covariance)))

    def denoise(x_t, t):
        x_0_hat = (gain[t] @ x_t.flatten(1)[:, :, None]).view_as(x_t)
        return Denoised(x_0_hat, process.predict_eps_from_x_0(schedule.alpha_bar, x_t, t, x_0_hat))

    return denoise


def toy_denoiser(schedule):
    """A denoiser with a made-up eps_hat, large enough that x_0_hat is sometimes clipped."""

    def denoise(x_t, t):
        eps_hat = 2 * torch.tanh(x_t.roll(1, 3) - 0.5 * x_t + t.view(-1, 1, 1, 1) / 50)
        return Denoised(process.predict_x_0_from_eps(schedule.alpha_bar, x_t, t, eps_hat), eps_hat)

    return denoise


def normal(shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=dtype)


def levels_to_x(level):
    return level.double() / 127.5 - 1


def grey(shape, mean, std):
    """8-bit images whose pixels are from N(mean, std^2)."""
    return levels_to_x(((mean + std * normal(shape, 1)() + 1) * 127.5).round().clamp(0, 255))


def ancestral(denoise, schedule, noise, timesteps=None, variance="beta_tilde", **settings):
    """`samplers.ancestral` with the variance of this name, at all timesteps unless some are given."""
    timesteps = range(schedule.num_timesteps)[::-1] if timesteps is None else timesteps
    table = None if variance == "learned" else fixed_variance(respaced(schedule, timesteps), variance)
    return samplers.ancestral(denoise, schedule, noise, timesteps=timesteps, variance=table, **settings)


def visited(sample, *arguments, **settings):
    """The x_t of every step of a sampler, and the image."""
    seen = []
    x = sample(*arguments, **settings, on_step=lambda step, x_t, x_0_hat: seen.append(x_t))
    return [*seen, x]
