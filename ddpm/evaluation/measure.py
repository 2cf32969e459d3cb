"""Measurements of a net: the bound of held-out images, and the features of sampled ones.

Image i depends on the seed and i alone, independent of worker and batch.

Axes: N images, H W, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpm.build import resolve_sample
from ddpm.config import Config, SampleConfig, SampleVariance
from ddpm.data.reading import Images
from ddpm.diffusion import denoising, likelihood, schedules
from ddpm.diffusion.denoisers import Denoise
from ddpm.diffusion.objectives import Denoised, Model, Objective
from ddpm.diffusion.reverse import Variance, fixed_variance
from ddpm.diffusion.samplers import PerImageNoise
from ddpm.evaluation.bits import BitsPerDim
from ddpm.evaluation.features import FeatureNet, Features, features_of
from ddpm.sampling import generate
from ddpm.utils import images
from ddpm.utils.errors import UserError
from ddpm.utils.generators import PhiloxGenerator
from ddpm.utils.images import Pixels
from ddpm.utils.seeding import Purpose

PIECE_IMAGES = 125
"""Images sampled or read as one batch."""
MEASURED_IMAGES = 125
"""Training images on which the errors of a net are measured."""


@dataclass(frozen=True)
class Measured:
    """Errors of a net on training images."""

    x_0_error: Tensor
    """[T] float64: the mean squared error of x_0_hat; for the variance "measured"."""
    proposal: Tensor
    """[T] float64: the distribution of timesteps for `bits_per_dim`."""


def bound_variance(config: Config, variance: SampleVariance = "auto") -> Variance:
    """The variance of p in the bound; auto is the best for the net: the learned one, else the measured one.

    Raises:
        UserError: "learned", but the net did not learn it.
    """
    learned = config.objective.variance == "learned"
    if variance == "auto":
        return "learned" if learned else "measured"
    sample = replace(config.sample, sampler="auto", variance=variance)
    resolve_sample(sample, config.objective)  # checks the variance
    return variance


def measure(
    net: Model,
    config: Config,
    objective: Objective,
    train: Images,
    variance: Variance,
    *,
    device: torch.device,
) -> Measured:
    """Measure the errors of x_0_hat, and the share of each timestep in the bound.

    Args:
        net: trained under `config`.
        train: MEASURED_IMAGES training images.
        variance: variance of p in the bound.

    Raises:
        UserError: the process has no such bound.
    """
    indices, schedule = range(len(train.image)), schedules.build(config.schedule)
    denoise, x_0, noise = _prepared(net, config, objective, train, indices, device, (0, Purpose.MEASURE))
    errors = likelihood.x_0_errors(denoise, schedule, x_0, noise)
    x_0_error = errors.mean(0)
    # A learned variance uses the proposal of the measured one, which is similar; any proposal is unbiased.
    fixed = fixed_variance(schedule, "measured" if variance == "learned" else variance, x_0_error)
    return Measured(x_0_error, likelihood.proposal(likelihood.kl_of_errors(schedule, errors, fixed)))


def bits_per_dim(
    net: Model,
    config: Config,
    objective: Objective,
    held_out: Images,
    *,
    start: int,
    device: torch.device,
    variance: Variance,
    measured: Measured,
    num_draws: int = 8,
    seed: int = 0,
) -> BitsPerDim:
    """The bound of a batch of images, estimated with `num_draws` + 1 evaluations of the net, or exact with T.

    Args:
        net: trained under `config`.
        held_out: the batch.
        start: index of its first image; noise and t of image i depend on the seed and i.
        variance: variance of p(x_{t-1} | x_t).
        measured: errors of this net.
        num_draws: timesteps per image; 0: all.

    Raises:
        UserError: the process has no such bound.
    """
    indices = range(start, start + len(held_out.image))
    denoise, x_0, noise = _prepared(
        net, config, objective, held_out, indices, device, (seed, Purpose.LIKELIHOOD)
    )
    schedule = schedules.build(config.schedule)
    how: dict[str, Any] = {"variance": variance, "x_0_error": measured.x_0_error}
    if num_draws == 0:
        bound = likelihood.exact(denoise, schedule, x_0, noise, **how)
    else:
        quantiles = [PhiloxGenerator(seed, Purpose.LIKELIHOOD, i, 1).uniform([]).double() for i in indices]
        u, chosen = torch.stack(quantiles), measured.proposal
        bound = likelihood.estimate(denoise, schedule, x_0, noise, u, chosen, num_draws=num_draws, **how)
    return BitsPerDim.of(bound)


def denoising_curve(
    net: Model,
    config: Config,
    objective: Objective,
    held_out: Images,
    log_snr: Tensor,
    *,
    device: torch.device,
) -> Tensor:
    """[N, L]: squared error of x_0_hat of each image at the noise levels log_snr [L], with the same noise for all nets.

    Raises:
        UserError: the process has no such levels.
    """
    indices = range(len(held_out.image))
    denoise, x_0, noise = _prepared(
        net, config, objective, held_out, indices, device, (0, Purpose.LIKELIHOOD)
    )
    return denoising.error_at(denoise, schedules.build(config.schedule), x_0, noise, log_snr)


def drawn_features(
    net: Model,
    config: Config,
    objective: Objective,
    feature_net: FeatureNet,
    indices: Sequence[int],
    *,
    device: torch.device,
    sample: SampleConfig | None = None,
    x_0_error: Tensor | None = None,
) -> tuple[Features, Pixels]:
    """Sample the images with these indices in one batch, and compute their features.

    Args:
        sample: settings of the sampler; default: config.sample. Images are those of jobs/sample.py.
        x_0_error: for the variance "measured".

    Returns:
        The features, and the images, uint8 [N, H, W, C].
    """
    image = generate.draw(net, config, objective, indices, device=device, sample=sample, x_0_error=x_0_error)
    return features_of(feature_net, image), image.cpu().numpy()


def _prepared(
    net: Model,
    config: Config,
    objective: Objective,
    batch: Images,
    indices: Sequence[int],
    device: torch.device,
    counters: tuple[int, ...],
) -> tuple[Denoise, Tensor, PerImageNoise]:
    """The net as `denoise`, x_0 [N, C, H, W], and noise that depends on the counters and an image's index."""
    if not objective.has_bound:
        raise UserError(f"the process {config.objective.process} has no variational bound, so no bits/dim")
    x_0 = images.to_model(torch.from_numpy(batch.image).to(device))
    label = torch.from_numpy(batch.label).to(device) if config.model.num_classes else None
    channels, height, width = x_0.shape[1:]
    generators = [PhiloxGenerator(*counters, i) for i in indices]

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return objective.denoise(net, x_t, t, label)

    return denoise, x_0, PerImageNoise(generators, (channels, height, width), device)
