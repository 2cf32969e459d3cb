"""Loss and bits/dim of the averaged weights on held-out images, measured while a run trains.

Every rank calls these functions: each measures its share of the images, and the ranks exchange their sums.
"""

import torch

from ddpm.build import TrainedNet
from ddpm.config import kinds
from ddpm.data.reading import LabelledImages
from ddpm.evaluation import bits_per_dim as bounds
from ddpm.training.runtime import Runtime

BATCH = 64
"""Images measured at once; their noise depends on it."""
PILOT_IMAGES = 8
"""Images for the errors of x_0_hat, the first ones."""
BOUND_IMAGES = 64
"""Images for bits/dim, the next ones."""
BOUND_DRAWS = 4
"""Timesteps measured of each of them."""


def mean_loss(averaged: TrainedNet, images: LabelledImages, runtime: Runtime) -> float:
    """Mean loss over the images: the same t and noise every time."""
    total = torch.zeros((), device=runtime.device)
    starts = range(0, len(images.image), BATCH)
    for start in starts[runtime.rank :: runtime.world_size]:
        batch = images[start : start + BATCH]
        total += bounds.loss(averaged, batch, start) * len(batch.image)
    return (runtime.mean(total) * runtime.world_size / len(images.image)).item()


def bits_per_dim(averaged: TrainedNet, images: LabelledImages, runtime: Runtime) -> dict[str, float]:
    """Bits/dim of a few images and the standard error, as metrics; comparable between schedules of equal T.

    Empty if the process has no bound, or there are too few images.
    """
    stop = min(PILOT_IMAGES + BOUND_IMAGES, len(images.image))
    has_bound = (
        kinds.objective(averaged.config.objective.process).has_bound
        and averaged.config.schedule.num_timesteps > 1
    )
    if not has_bound or stop < PILOT_IMAGES + 2:
        return {}
    errors = bounds.measure_errors(averaged, images[:PILOT_IMAGES])
    bits = torch.zeros(stop, device=runtime.device)
    starts = range(PILOT_IMAGES, stop, BATCH)
    for start in starts[runtime.rank :: runtime.world_size]:
        part = slice(start, min(start + BATCH, stop))
        bound = bounds.bound_terms(averaged, errors, images[part], start, BOUND_DRAWS)
        bits[part] = torch.from_numpy(bound.sum(1)).to(bits)
    bits = (runtime.mean(bits) * runtime.world_size)[PILOT_IMAGES:]
    error = bits.std() / len(bits) ** 0.5
    return {"held_out/bits_per_dim": bits.mean().item(), "held_out_error/bits_per_dim": error.item()}
