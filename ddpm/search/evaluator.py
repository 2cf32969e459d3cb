"""Evaluation of a trial's checkpoint during training: the bound of held-out images, and the losses of a naive search.

All trials of a search are evaluated with the same images, the same noise and the same quantiles of t (common random
numbers): between two trials only the nets and the schedules differ. The numbers are those of jobs/evaluate.py. Feature
nets are not imported: the import would cost the trial's driver seconds.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddpm.build import build_objective
from ddpm.checkpoints import checkpoint
from ddpm.config import Config, SampleVariance
from ddpm.data.reading import DataSet, Images
from ddpm.diffusion.objectives import Model, Objective
from ddpm.evaluation import measure
from ddpm.evaluation.bits import BitsPerDim
from ddpm.evaluation.reference import images_of
from ddpm.evaluation.scores import LEAST_IMAGES
from ddpm.hub import resolve
from ddpm.search.event_log import Rung
from ddpm.utils import images, strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.generators import generator
from ddpm.utils.seeding import Purpose


@dataclass(frozen=True)
class Evaluation:
    """Results of one checkpoint."""

    images_seen: int
    bits: tuple[float, ...]
    """The whole bound of each held-out image, bits/dim; the same images for all trials."""
    held_out_loss: float
    train_loss: float

    def rung(self, training_s: float) -> Rung:
        bits = np.array(self.bits)
        error = bits.std(ddof=1) / len(bits) ** 0.5
        losses = self.held_out_loss, self.train_loss
        return Rung(self.images_seen, float(bits.mean()), float(error), *losses, training_s)

    def to_json(self) -> str:
        return json.dumps({**vars(self), "bits": list(self.bits)}, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Evaluation":
        """Parse the output of `to_json`.

        Raises:
            UserError: it is damaged; `where` names the file.
        """
        return strict_json.parse(cls, text, f"{where} is damaged")


@dataclass(frozen=True)
class Evaluator:
    """Evaluates checkpoints.

    Args:
        train: the training split.
        held_out: the held-out split.
        num_images: largest number of images of each split.
        num_draws: timesteps per image at which KL_t is measured; 0: all.
        seed: of the noise and the quantiles of t.
        variance: of p in the bound; auto: learned if the net learned it, else measured, so that the result does not
            depend on the number of steps of the schedule.
    """

    train: DataSet
    held_out: DataSet
    num_images: int
    num_draws: int = 8
    seed: int = 0
    variance: SampleVariance = "auto"

    def __post_init__(self) -> None:
        if self.num_images < LEAST_IMAGES:
            raise UserError(f"--num-images is {self.num_images}; it must be at least {LEAST_IMAGES}")

    def evaluate(self, uri: str) -> Evaluation:
        """Evaluate the averaged weights of the checkpoint at `uri`.

        Raises:
            UserError: a number is not finite, or data cannot be read.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with resolve.local_checkpoint(uri) as folder:
            net, config = checkpoint.load_net(folder, device)
            position = checkpoint.read_state(folder)
        candidate = net, config, build_objective(config)
        variance = measure.bound_variance(config, self.variance)
        pilot = images_of(self.train, 0, measure.MEASURED_IMAGES)
        measured = measure.measure(*candidate, pilot, variance, device=device)
        how: dict[str, Any] = {"device": device, "variance": variance, "measured": measured}
        how |= {"num_draws": self.num_draws, "seed": self.seed}
        batches = self._batches(self.held_out)
        bits = BitsPerDim.merge(*(measure.bits_per_dim(*candidate, b, start=i, **how) for i, b in batches))
        losses = [self._loss(*candidate, data_set, device) for data_set in (self.held_out, self.train)]
        found = Evaluation(position["images_seen"], tuple(map(float, bits.total)), *losses)
        if not np.isfinite([*found.bits, *losses]).all():
            raise UserError(f"the bound of {uri} is not finite: its net is unusable; lower optim.lr")
        return found

    @torch.no_grad()
    def _loss(
        self, net: Model, config: Config, objective: Objective, data_set: DataSet, device: torch.device
    ) -> float:
        """The training loss of the averaged weights, with the same images, noise and uniforms for all trials."""
        total, n = 0.0, 0
        for start, batch in self._batches(data_set):
            x_0 = images.to_model(torch.from_numpy(batch.image).to(device))
            label = torch.from_numpy(batch.label).to(device) if config.model.num_classes else None
            noise = generator(device, self.seed, Purpose.HELD_OUT, start)
            total += objective.loss(net, x_0, label, noise).value.item() * len(x_0)
            n += len(x_0)
        return total / n

    def _batches(self, data_set: DataSet) -> Iterator[tuple[int, Images]]:
        """The first images of a split in batches, each with the index of its first image."""
        n = min(self.num_images, data_set.rows.num_rows)
        for start in range(0, n, measure.PIECE_IMAGES):
            yield start, images_of(data_set, start, min(start + measure.PIECE_IMAGES, n))
