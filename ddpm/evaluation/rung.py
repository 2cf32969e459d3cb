"""What ranks the trials of a search, measured by the loop: the bound of held-out images, and two losses.

All trials of a search are measured with the same images, the same noise and the same quantiles of t (common random
numbers): between two trials only the nets and the schedules differ. The numbers are those of ddpm evaluate. Every
second image ranks the trials and the others report the best one. The bound depends on T for any net
(diffusion/reverse.py).

    RUN/rungs/000000006400.json    the Evaluation at 6,400 images, stored before the checkpoint there
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm.build import TrainedNet
from ddpm.config.tree import BoundVariance
from ddpm.data.reading import DataSet, LabelledImages
from ddpm.evaluation import bits_per_dim
from ddpm.evaluation.features import images_of
from ddpm.evaluation.metrics import Estimate
from ddpm.runs.storage import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

FOLDER = "rungs"
RANKING = slice(0, None, 2)
"""The held-out images, by position in the plan's order, that rank trials."""
REPORTING = slice(1, None, 2)
"""Those that report the best trial. Its value on the images that ranked it is optimistic: selection bias."""
LOSS_IMAGES = 2 * bits_per_dim.PIECE_IMAGES
"""Images of a batch of which every second one is measured."""


@dataclass(frozen=True)
class Evaluation:
    """Results of one checkpoint."""

    images_seen: int
    bits: tuple[float, ...]
    """The whole bound of each held-out image, bits/dim; the same images for all trials."""
    held_out_loss: float
    train_loss: float

    @property
    def bits_per_dim(self) -> Estimate:
        """Mean and standard error on the images that rank."""
        bits = np.array(self.bits)[RANKING]
        return Estimate(float(bits.mean()), float(bits.std(ddof=1) / len(bits) ** 0.5))

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite([*self.bits, self.held_out_loss, self.train_loss]).all())

    def to_json(self) -> bytes:
        return (json.dumps(vars(self), allow_nan=False) + "\n").encode()


def file_name(images_seen: int) -> str:
    """Name in the run's folder of the file with an Evaluation."""
    return f"{FOLDER}/{images_seen:012d}.json"


def read(run: Location, images_seen: int, timeout_s: float = 0.0) -> Evaluation:
    """The results in a run's folder; FileNotFoundError: there are none."""
    file = run.child(file_name(images_seen))
    text = retry_io(file.read, where=file.uri, timeout_s=timeout_s)
    return strict_json.parse(Evaluation, text, f"{file.uri} is damaged")


def recorded_at(run: Location, timeout_s: float = 0.0) -> list[int]:
    """images_seen of the results in a run's folder, ascending."""
    names = retry_io(run.child(FOLDER).files, where=run.uri, timeout_s=timeout_s)
    return sorted(int(name.removesuffix(".json")) for name in names if name.endswith(".json"))


@dataclass(frozen=True)
class Evaluator:
    """Measures a net on two splits."""

    train: DataSet
    held_out: DataSet
    num_images: int
    """Largest number of images of each split."""
    num_draws: int = 8
    """Timesteps per image at which KL_t is measured; 0: all."""
    seed: int = 0
    """Seed of the noise and the quantiles of t."""
    variance: BoundVariance = "auto"

    def evaluate(
        self,
        trained: TrainedNet,
        images_seen: int,
        rank: int = 0,
        world_size: int = 1,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> Evaluation:
        """Measure a net, on all workers together: each takes some of the batches.

        Args:
            total: sums a tensor over the workers.

        Raises:
            UserError: a result is not finite.
        """
        mine = slice(rank, None, world_size)
        num_held_out = min(self.num_images, self.held_out.rows.num_rows)
        bits = torch.zeros(num_held_out, dtype=torch.float64)
        pilot = images_of(self.train, 0, bits_per_dim.MEASURED_IMAGES)
        errors = bits_per_dim.measure_errors(trained, pilot, self.variance)
        for start, batch in self._batches(self.held_out, bits_per_dim.PIECE_IMAGES, mine):
            bound = bits_per_dim.bound_terms(
                trained, errors, batch, start=start, num_draws=self.num_draws, seed=self.seed
            )
            bits[start : start + len(bound)] = torch.from_numpy(bound.sum(1))
        held_out_loss = self._loss(trained, self.held_out, mine)
        train_loss = self._loss(trained, self.train, mine)
        summed = total(torch.cat([bits, held_out_loss, train_loss]).to(trained.device)).cpu()
        of_image, of_held_out, of_train = summed.split([num_held_out, 2, 2])
        found = Evaluation(
            images_seen=images_seen,
            bits=tuple(of_image.tolist()),
            held_out_loss=(of_held_out[0] / of_held_out[1]).item(),
            train_loss=(of_train[0] / of_train[1]).item(),
        )
        if not found.is_finite:
            raise UserError(
                f"the bound after {images_seen:,} images is not finite: the net is unusable; lower optim.lr"
            )
        return found

    def _loss(self, trained: TrainedNet, data_set: DataSet, mine: slice) -> Tensor:
        """[2]: the sum of the training loss on RANKING, with the same noise for all trials, and the images."""
        total = torch.zeros(2, dtype=torch.float64)
        for start, both in self._batches(data_set, LOSS_IMAGES, mine):
            batch = both[RANKING]
            num_images = len(batch.image)
            loss = bits_per_dim.loss(trained, batch, start, self.seed).item()
            total += torch.tensor([loss * num_images, num_images], dtype=torch.float64)
        return total

    def _batches(self, data_set: DataSet, size: int, mine: slice) -> Iterator[tuple[int, LabelledImages]]:
        """This worker's batches of the first images of a split, each with the index of its first image."""
        n = min(self.num_images, data_set.rows.num_rows)
        starts: Sequence[int] = range(0, n, size)
        reader = data_set.fixed_order()
        for start in starts[mine]:
            yield start, reader.read(start, min(start + size, n))


@dataclass(frozen=True)
class Rungs:
    """Where a trial is measured, and how."""

    at: tuple[int, ...]
    """images_seen, ascending; there are checkpoints there."""
    evaluator: Evaluator
