"""Evaluation of a trial's checkpoint during training: the bound of held-out images, and the losses of a naive search.

All trials of a search are evaluated with the same images, the same noise and the same quantiles of t (common random
numbers): between two trials only the nets and the schedules differ. The numbers are those of jobs/evaluate.py. Every
second image ranks the trials and the others report the best one. The bound depends on T for any net
(diffusion/reverse.py). Feature nets are not imported: the import would cost the trial's driver seconds.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ddpm.build import TrainedNet
from ddpm.checkpoints import checkpoint
from ddpm.config import BoundVariance
from ddpm.data.reading import DataSet, Images
from ddpm.evaluation import measure
from ddpm.evaluation.reference import images_of
from ddpm.hub import resolve
from ddpm.search.event_log import Rung
from ddpm.storage.locations import Location
from ddpm.utils import devices, strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

RUNGS_FOLDER = "rungs"
"""Folder of a run with the results at its rungs."""
RANKING, REPORTING = slice(0, None, 2), slice(1, None, 2)
"""Held-out images, by position in the plan's order: those that rank trials, and those that report the best one. The
best of several on the same images is best there by chance, too: its value on them is too low."""


@dataclass(frozen=True)
class Evaluation:
    """Results of one checkpoint."""

    images_seen: int
    bits: tuple[float, ...]
    """The whole bound of each held-out image, bits/dim; the same images for all trials."""
    held_out_loss: float
    train_loss: float

    def rung(self, training_s: float) -> Rung:
        bits = np.array(self.bits)[RANKING]
        error = bits.std(ddof=1) / len(bits) ** 0.5
        losses = self.held_out_loss, self.train_loss
        return Rung(self.images_seen, float(bits.mean()), float(error), *losses, training_s)

    def write(self, run: Location, timeout_s: float = 0.0) -> None:
        """Store the results in a run's folder; storage may fail for `timeout_s`."""
        file = _file(run, self.images_seen)
        data = (json.dumps(vars(self), allow_nan=False) + "\n").encode()
        retry_io(lambda: file.write(data), where=file.uri, timeout_s=timeout_s)

    @classmethod
    def read(cls, run: Location, images_seen: int, timeout_s: float) -> "Evaluation":
        """The results in a run's folder; FileNotFoundError: there are none."""
        file = _file(run, images_seen)
        text = retry_io(file.read, where=file.uri, timeout_s=timeout_s)
        return strict_json.parse(cls, text, f"{file.uri} is damaged")


def _file(run: Location, images_seen: int) -> Location:
    return run.child(RUNGS_FOLDER).child(f"{images_seen:012d}.json")


@dataclass(frozen=True)
class Evaluator:
    """Evaluates checkpoints on two splits."""

    train: DataSet
    held_out: DataSet
    num_images: int
    """Largest number of images of each split."""
    num_draws: int = 8
    """Timesteps per image at which KL_t is measured; 0: all."""
    seed: int = 0
    """Seed of the noise and the quantiles of t."""
    variance: BoundVariance = "auto"

    def evaluate(self, location: Location) -> Evaluation:
        """Evaluate the averaged weights of the checkpoint at `location`."""
        device = devices.default()
        with resolve.as_folder(location, self.train.timeout_s) as folder:
            trained = checkpoint.load_net(folder, device)
            position = checkpoint.read_state(folder)
        measured = measure.measure(trained, images_of(self.train, 0, measure.MEASURED_IMAGES), self.variance)
        parts = [
            measure.bits_per_dim(trained, measured, batch, start, self.num_draws, self.seed)
            for start, batch in self._batches(self.held_out)
        ]
        bits = tuple(np.concatenate(parts).sum(1).tolist())
        losses = [self._loss(trained, data_set) for data_set in (self.held_out, self.train)]
        if not np.isfinite([*bits, *losses]).all():
            raise UserError(f"the bound of {location.uri} is not finite: its net is unusable; lower optim.lr")
        return Evaluation(position["images_seen"], bits, *losses)

    def _loss(self, trained: TrainedNet, data_set: DataSet) -> float:
        """The training loss of the averaged weights on RANKING, with the same noise and uniforms for all trials."""
        total, n = 0.0, 0
        for start, both in self._batches(data_set, 2 * measure.PIECE_IMAGES):
            batch = both[RANKING]
            total += measure.loss(trained, batch, start, self.seed).item() * len(batch.image)
            n += len(batch.image)
        return total / n

    def _batches(self, data_set: DataSet, size: int = measure.PIECE_IMAGES) -> Iterator[tuple[int, Images]]:
        """The first images of a split in batches, each with the index of its first image."""
        n = min(self.num_images, data_set.rows.num_rows)
        for start in range(0, n, size):
            yield start, images_of(data_set, start, min(start + size, n))
