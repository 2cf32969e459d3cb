"""The bound of held-out images in bits/dim, and their training loss.

Training, the search and ddpm evaluate measure with these functions. The bound of image i depends on the seed and i
alone, not on worker and batch; the loss depends on the batch, too. `start` is the index of the first image of a batch.

Axes: N images, H W, C channels, T timesteps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.build import TrainedNet, build_schedule
from ddpm.config import kinds
from ddpm.config.tree import BoundVariance, Config
from ddpm.data.reading import LabelledImages
from ddpm.diffusion import likelihood
from ddpm.diffusion.guidance import Denoise
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.reverse import ReverseVariance, fixed_variance
from ddpm.diffusion.samplers import PerImageNoise
from ddpm.runs.evaluations import Score
from ddpm.sampling.pool import check_cancelled
from ddpm.utils.errors import UserError
from ddpm.utils.generators import PhiloxGenerator, generator
from ddpm.utils.seeding import Purpose

PIECE_IMAGES = 125
"""Images sampled or read as one batch."""
MEASURED_IMAGES = 125
"""Training images on which the errors of a net are measured."""


@dataclass(frozen=True)
class NetErrors:
    """Errors of a net on a few images, with which `bound_terms` measures others."""

    variance: ReverseVariance
    """The variance of p(x_{t-1} | x_t) in the bound."""
    x_0_error: Tensor
    """[T] float64: the mean squared error of x_0_hat; for the variance "measured"."""
    proposal: Tensor
    """[T] float64: the distribution of timesteps for `bound_terms`."""


def bound_variance(config: Config, variance: BoundVariance = "auto") -> ReverseVariance:
    """The variance of p in the bound; auto is the best for the net: the learned one, else the measured one.

    The choice does not depend on the number of steps of the schedule; the bound does (diffusion/reverse.py).
    """
    learned = config.objective.variance == "learned"
    if variance == "auto":
        return "learned" if learned else "measured"
    if variance == "learned" and not learned:
        raise UserError(
            "variance is learned, but this net did not learn it; use beta, beta_tilde or measured"
        )
    return variance


@torch.no_grad()
def loss(trained: TrainedNet, batch: LabelledImages, start: int, seed: int = 0) -> Tensor:
    """The training loss of a batch, [], with the same noise and t for all nets."""
    x_0, label = trained.inputs(batch.image, batch.label)
    noise = generator(trained.device, seed, Purpose.HELD_OUT, start)
    return trained.objective.loss(trained.net, x_0, label, noise).value


def measure_errors(trained: TrainedNet, batch: LabelledImages, variance: BoundVariance = "auto") -> NetErrors:
    """Measure the errors of x_0_hat, and the share of each timestep in the bound.

    Args:
        batch: other images than those whose bound is measured.
        variance: as in `bound_variance`.
    """
    chosen = bound_variance(trained.config, variance)
    schedule = build_schedule(trained.config.schedule)
    denoise, x_0, noise = _prepared(trained, batch, range(len(batch.image)), (0, Purpose.MEASURE))
    x_0_max = trained.config.data.x_0_max
    errors = likelihood.x_0_errors(denoise, schedule, x_0, noise, x_0_max=x_0_max)
    x_0_error = errors.mean(0)
    # A learned variance uses the proposal of the measured one, which is similar; any proposal is unbiased.
    fixed = fixed_variance(schedule, "measured" if chosen == "learned" else chosen, x_0_error, x_0_max)
    proposal = likelihood.proposal(likelihood.kl_of_errors(schedule, errors, fixed))
    return NetErrors(chosen, x_0_error, proposal)


def bound_terms(
    trained: TrainedNet,
    errors: NetErrors,
    batch: LabelledImages,
    start: int,
    num_draws: int = 8,
    seed: int = 0,
) -> NDArray[np.float64]:
    """The bound's terms for each image of a batch.

    Args:
        errors: those of this net.
        num_draws: timesteps per image; the estimate takes one more evaluation of the net. 0: all timesteps, exact.

    Returns:
        [N, 3]: prior, sum of KL_t, decoder; the bound is their sum.
    """
    indices = range(start, start + len(batch.image))
    denoise, x_0, noise = _prepared(trained, batch, indices, (seed, Purpose.LIKELIHOOD))
    schedule = build_schedule(trained.config.schedule)
    x_0_max = trained.config.data.x_0_max
    if errors.variance == "learned":
        fixed = None
    else:
        fixed = fixed_variance(schedule, errors.variance, errors.x_0_error, x_0_max)
    if num_draws == 0 or schedule.num_timesteps == 1:
        bound = likelihood.exact(denoise, schedule, x_0, noise, fixed, x_0_max)
    else:
        quantiles = [PhiloxGenerator(seed, Purpose.LIKELIHOOD, i, 1).uniform([]).double() for i in indices]
        drawn = likelihood.draw_timesteps(schedule, errors.proposal, torch.stack(quantiles), num_draws)
        bound = likelihood.estimate(denoise, schedule, x_0, noise, fixed, drawn, x_0_max)
    return torch.stack([bound.prior, bound.kl.sum(1), bound.decoder], 1).numpy()


def bound_score(terms: NDArray[np.float64], autoencoder: str | None = None) -> Score:
    """The bound in bits/dim; the error is over images, noise and t.

    Args:
        terms: [N, 3], from `bound_terms`.
        autoencoder: digest of what made the latents that the net generates, which is part of the score's name: bits of
            latents compare with those of the same latents alone. None: the net generates images.
    """
    bits = terms.sum(axis=1)
    n = len(bits)
    error = float(bits.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    name = "bits/dim" if autoencoder is None else f"bits/dim-latents-{autoencoder[:8]}"
    return Score(name, float(bits.mean()), error, n)


def _prepared(
    trained: TrainedNet, batch: LabelledImages, indices: Sequence[int], counters: tuple[int, ...]
) -> tuple[Denoise, Tensor, PerImageNoise]:
    """The net as `denoise`, x_0 [N, C, H, W], and noise that depends on the counters and an image's index."""
    process = trained.config.objective.process
    if not kinds.objective(process).has_bound:
        raise UserError(f"the process {process} has no variational bound, so no bits/dim")
    x_0, label = trained.inputs(batch.image, batch.label)
    channels, height, width = x_0.shape[1:]
    generators = [PhiloxGenerator(*counters, i) for i in indices]

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        check_cancelled()
        return trained.objective.denoise(trained.net, x_t, t, label)

    return denoise, x_0, PerImageNoise(generators, (channels, height, width), trained.device)
