"""Pictures of a run: a grid of samples, a denoising strip, and those of the finished run."""

import torch

from ddpm.build import TrainedNet
from ddpm.data.reading import LabelledImages
from ddpm.sampling import generate
from ddpm.training.runtime import Runtime
from ddpm.utils import images
from ddpm.utils.images import Pixels

STRIP_IMAGES = 4


def sample_grid(averaged: TrainedNet, runtime: Runtime) -> Pixels:
    """Sample a grid of the same seeds every time, with a column for each class.

    Every rank calls it, and generates its share.
    """
    num_images = averaged.config.sample.num_images
    per_rank = -(-num_images // runtime.world_size)
    mine = range(runtime.rank, per_rank * runtime.world_size, runtime.world_size)
    drawn = runtime.gather(generate.draw(averaged, mine))
    order = torch.arange(len(drawn)).reshape(runtime.world_size, per_rank).T.reshape(-1)
    return generate.grid(averaged, drawn.cpu()[order][:num_images].numpy())


def denoising_strip(averaged: TrainedNet, held_out: LabelledImages) -> Pixels:
    """Held-out images, noised and denoised."""
    some = held_out[:STRIP_IMAGES]
    x_0, label = averaged.inputs(some.image, some.label)
    return generate.denoising_strip(averaged, x_0, label)


def final_pictures(averaged: TrainedNet, held_out: LabelledImages | None) -> dict[str, bytes]:
    """Pictures of the finished run by file name: forward noising, and the reverse trajectory."""
    pictures = {}
    if held_out is not None:
        some = held_out[:STRIP_IMAGES]
        x_0, _ = averaged.inputs(some.image, some.label)
        pictures["forward_noising.png"] = images.png_bytes(generate.noising_strip(averaged.config, x_0))
    strip, gif = generate.trajectory(averaged, range(STRIP_IMAGES))
    pictures["reverse_trajectory.png"] = images.png_bytes(strip)
    pictures["reverse_trajectory.gif"] = gif
    return pictures
