"""From a net and its config to what it is judged by: the bound of held-out images, the features of drawn ones.

Its own room because it stands on generation.py and on evaluation/, and because workers on a cluster and a laptop
judge alike: image i depends on the seed and i alone, whoever does it, in whatever batch.

Axes: N images, H W, C channels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddpm import generation, images
from ddpm.config import Config, SampleConfig, UserError
from ddpm.data.reading import Images
from ddpm.diffusion import denoising, likelihood, schedules
from ddpm.diffusion.denoisers import Denoise
from ddpm.diffusion.likelihood import Variance
from ddpm.diffusion.objectives import Denoised, Model, Objective
from ddpm.diffusion.samplers import PerImageNoise
from ddpm.evaluation.bits import BitsPerDim
from ddpm.evaluation.features import FeatureNet, Features, features_of
from ddpm.images import Pixels
from ddpm.training.state import LIKELIHOOD, seed_for

PIECE_IMAGES = 125
"""Images drawn or read as one batch."""
PILOT_IMAGES = 8
"""Images from which is learned where on the schedule the bound comes from."""


def proposal(
    net: Model,
    config: Config,
    objective: Objective,
    pilot: Images,
    *,
    device: torch.device,
    variance: Variance = "beta_tilde",
) -> Tensor:
    """[T]: the timesteps that `bits_per_dim` had better draw, learned from a few images.

    Args:
        net: trained under `config`.
        pilot: PILOT_IMAGES are enough.

    Raises:
        UserError: the process has no such bound.
    """
    denoise, x_0, noise = _posed(net, config, objective, pilot, range(len(pilot.image)), device, seed=0)
    bound = likelihood.exact(denoise, schedules.build(config.schedule), x_0, noise, variance=variance)
    return likelihood.proposal(bound)


def bits_per_dim(
    net: Model,
    config: Config,
    objective: Objective,
    held_out: Images,
    *,
    start: int,
    device: torch.device,
    variance: Variance = "beta_tilde",
    proposal: Tensor | None = None,
    num_draws: int = 8,
    seed: int = 0,
) -> BitsPerDim:
    """The bound of a batch of images, exact at T evaluations of the net, or estimated at `num_draws` + 1.

    Args:
        net: trained under `config`.
        held_out: the batch.
        start: index of its first image; noise and t of image i depend on the seed and i.
        variance: of p(x_{t-1} | x_t).
        proposal: [T], of `proposal`; None: all t.
        num_draws: timesteps an image, with a proposal.

    Raises:
        UserError: the process has no such bound.
    """
    indices = range(start, start + len(held_out.image))
    denoise, x_0, noise = _posed(net, config, objective, held_out, indices, device, seed)
    schedule = schedules.build(config.schedule)
    if proposal is None:
        bound = likelihood.exact(denoise, schedule, x_0, noise, variance=variance)
    else:
        # Not (..., i, 0): numpy's SeedSequence does not tell a last 0 from none, and that is the noise's.
        u = torch.tensor([seed_for(seed, LIKELIHOOD, i, 1) / 2**63 for i in indices], dtype=torch.float64)
        bound = likelihood.estimate(
            denoise, schedule, x_0, noise, u, proposal, num_draws=num_draws, variance=variance
        )
    return BitsPerDim.of(bound, start, schedule.num_timesteps)


def denoising_curve(
    net: Model,
    config: Config,
    objective: Objective,
    held_out: Images,
    log_snr: Tensor,
    *,
    device: torch.device,
    seed: int = 0,
) -> Tensor:
    """[N, L]: the squared error of x_0_hat of each image at the noise levels log_snr [L], the same noise for all nets.

    Raises:
        UserError: the process has no such levels.
    """
    indices = range(len(held_out.image))
    denoise, x_0, noise = _posed(net, config, objective, held_out, indices, device, seed)
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
) -> tuple[Features, Pixels]:
    """Draw the images with these ascending indices, in one batch, and take their features.

    Args:
        sample: how to draw; default: config.sample. Images are those of jobs/sample.py.

    Returns:
        The features, and the images, uint8 [N, H, W, C].
    """
    image = generation.draw(net, config, objective, indices, device=device, sample=sample)
    features = Features(np.array(indices, np.int64), features_of(feature_net, image).values)
    return features, image.cpu().numpy()


def _posed(
    net: Model,
    config: Config,
    objective: Objective,
    batch: Images,
    indices: Sequence[int],
    device: torch.device,
    seed: int,
) -> tuple[Denoise, Tensor, PerImageNoise]:
    """The net as the bound sees it, x_0 [N, C, H, W], and noise that depends on the seed and an image's index."""
    if config.objective.process != "gaussian":
        raise UserError(
            f"the process {config.objective.process} has no variational bound; only gaussian has bits/dim"
        )
    x_0 = images.to_model(torch.from_numpy(batch.image).to(device))
    label = torch.from_numpy(batch.label).to(device) if config.model.num_classes else None
    channels, height, width = x_0.shape[1:]
    seeds = [seed_for(seed, LIKELIHOOD, i) for i in indices]

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return objective.denoise(net, x_t, t, label)

    return denoise, x_0, PerImageNoise(seeds, (channels, height, width), device)
