"""Sampling of many images: a worker pool samples them, a writer stores them, existing images are skipped.

Images are sampled in pieces, [k batch_size, (k + 1) batch_size) cut off at the last image. Pieces do not depend on the
workers, their number, or the images that exist. Image i is a function of the seed and i: within a grey level in any
batch (tests/sampling/test_generate.py), bit for bit in the same piece on one kind of CPU.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.build import TrainedNet, build_sampler, resolve_sample
from ddpm.config.json import flatten, keys_that_affect
from ddpm.config.tree import Affects, Config
from ddpm.diffusion.samplers import Sampler
from ddpm.runs.storage import Location
from ddpm.sampling import generate, writers
from ddpm.sampling.pool import WorkerPool
from ddpm.sampling.writers import PngWriter
from ddpm.utils.errors import UserError
from ddpm.utils.images import Pixels, png_bytes
from ddpm.utils.retry import as_user_error
from ddpm.utils.seeding import GENERATOR

BATCH_SIZE_CPU = 32
BATCH_SIZE_GPU = 256
"""Default images per piece: few images keep a core busy, and many cores need many pieces."""
TRAJECTORY_IMAGES = 8


@dataclass(frozen=True)
class SampleJob:
    """The images to sample: everything that determines image i and its file."""

    trained: TrainedNet
    """Its config has the sampling configuration, with the seed."""
    label: int | None = None
    """The number of the class of all images; None: image i has class i mod num_classes."""
    sampler: Sampler | None = None
    """Used in place of the one that the configuration describes, by `in_memory` alone: no file could say what it
    draws."""
    batch_size: int | None = None
    """Images per batch of a worker; None: 32 on a core, 256 on a GPU."""

    @property
    def config(self) -> Config:
        return self.trained.config

    def __post_init__(self) -> None:
        generate.class_of(self.trained, self.label)  # checks it
        if self.sampler is None:
            build_sampler(self.config)

    def grid(self, drawn: Pixels) -> Pixels:
        """The first images of the job, uint8 [N, H, W, C], as one RGB image."""
        return generate.grid(self.trained, drawn, self.label)

    def request(self, batch_size: int) -> dict[str, Any]:
        """Everything that determines image i and its file, as flat JSON."""
        if self.sampler is not None:
            raise ValueError("sampler is given; images by it are drawn with `in_memory`")
        config = self.config
        config = replace(config, sample=resolve_sample(config.sample, config.objective))
        keys = keys_that_affect(config, Affects.NET | Affects.SAMPLING)
        flat = {key: value for key, value in flatten(config).items() if key in keys}
        request = {
            "batch_size": batch_size,
            "generator": GENERATOR,
            "weights": _sha256(self.trained.net.state_dict()),
            "label": self.label,
        }
        return request | flat


class SampleWorker:
    """The state of a worker: a job, with its net on the device."""

    def __init__(self, job: SampleJob, device: torch.device) -> None:
        self._trained = job.trained
        self._given: dict[str, Any] = {"label": job.label, "sampler": job.sampler}
        job.trained.net.to(device).eval().requires_grad_(False)

    def draw(self, indices: range) -> Pixels:
        """The images with these indices, uint8 [N, H, W, C]; UserError if they do not fit into the GPU's memory."""
        try:
            drawn = generate.draw(self._trained, indices, **self._given)
        except torch.OutOfMemoryError:
            raise UserError(
                f"the GPU has no memory for {len(indices)} images at a time; use a smaller --batch-size"
            ) from None
        return drawn.cpu().numpy()

    def trajectory(self, indices: range) -> tuple[Pixels, bytes]:
        """The trajectories of these images: a strip uint8 [H', W', 3], and a GIF."""
        return generate.trajectory(self._trained, indices, **self._given)


def draw(
    job: SampleJob,
    out: Location,
    num_images: int,
    *,
    num_workers: int | None = None,
    with_trajectory: bool = False,
    show: Callable[[int, str], None] = lambda done, detail: None,
) -> None:
    """Sample those of images 0..num_images-1 that are missing at `out`.

    Args:
        num_workers: as in `WorkerPool`.
        with_trajectory: also write trajectory.png and trajectory.gif of the first 8 images.
        show: called with the number of existing images, and the speed.
    """
    with WorkerPool(partial(SampleWorker, job), num_workers) as pool:
        size, pieces = _pieces(job, pool, num_images)
        with as_user_error(f"cannot write images to {out.uri}; run the same command again to continue"):
            writers.begin(out, job.request(size))
            writer = PngWriter(out, num_images, size, job.grid)
            before = writer.num_kept
            done = before
            began = time.monotonic()
            show(done, "")
            for piece, pixels in pool.map(SampleWorker.draw, filter(writer.missing, pieces)):
                writer.write(piece, pixels)
                done += len(piece)
                show(done, f"{(done - before) / (time.monotonic() - began):.1f} images/s")
            writer.close()
            if with_trajectory and (done > before or not out.child("trajectory.gif").exists()):
                first = range(min(TRAJECTORY_IMAGES, num_images))
                for _, (strip, gif) in pool.map(SampleWorker.trajectory, [first]):
                    out.child("trajectory.png").write(png_bytes(strip))
                    out.child("trajectory.gif").write(gif)


def in_memory(job: SampleJob, num_images: int) -> Pixels:
    """Images 0..num_images-1, uint8 [N, H, W, C]: those that `draw` stores."""
    if num_images < 1:
        raise UserError(f"num_images is {num_images}; it must be at least 1")
    with WorkerPool(partial(SampleWorker, job)) as pool:
        _, pieces = _pieces(job, pool, num_images)
        drawn = dict(pool.map(SampleWorker.draw, pieces))
    return np.concatenate([drawn[piece] for piece in sorted(drawn, key=lambda piece: piece.start)])


def _pieces(job: SampleJob, pool: WorkerPool[SampleWorker], num_images: int) -> tuple[int, Iterator[range]]:
    """Images per piece, and the pieces."""
    size = job.batch_size or (BATCH_SIZE_GPU if pool.has_gpus else BATCH_SIZE_CPU)
    return size, (range(i, min(i + size, num_images)) for i in range(0, num_images, size))


def _sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
