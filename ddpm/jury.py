"""A trial's checkpoint, judged beside its training: the bound of held-out images, and the losses a naive search reads.

All trials of a search are judged by the same images, the same noise and the same quantiles of t (common random
numbers): between two trials only the nets and the schedules differ. The numbers are those of jobs/evaluate.py.

Its own room because evaluate.py judges what is finished, all at once, and this one checkpoint in the trial's driver.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddpm import generation, images
from ddpm.config import UserError
from ddpm.data.reading import DataSet
from ddpm.evaluate import PIECE_IMAGES, Bench, Piece, images_of
from ddpm.evaluation.bits import BitsPerDim
from ddpm.evaluation.pixels import Pixels
from ddpm.evaluation.scores import LEAST_IMAGES
from ddpm.training.state import HELD_OUT, generator
from ddpm.trials import Rung
from ddpm.yardstick import Candidate, Settings


@dataclass(frozen=True)
class Judged:
    """What was found of one checkpoint."""

    images_seen: int
    bits: tuple[float, ...]
    """The whole bound of each held-out image, bits/dim; the same images for all trials."""
    held_out_loss: float
    train_loss: float

    def rung(self, training_s: float) -> Rung:
        bits = np.array(self.bits)
        error = bits.std(ddof=1) / len(bits) ** 0.5
        return Rung(
            self.images_seen,
            float(bits.mean()),
            float(error),
            self.held_out_loss,
            self.train_loss,
            training_s,
        )

    def to_json(self) -> str:
        return json.dumps({**vars(self), "bits": list(self.bits)}, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Judged":
        """What `to_json` wrote.

        Raises:
            UserError: it is damaged; `where` names the file.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(**{**fields, "bits": tuple(map(float, fields["bits"]))})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{where} is damaged: {error!r:.200}") from None


@dataclass(frozen=True)
class Jury:
    """How checkpoints are judged.

    Args:
        train: the split trained on.
        held_out: the split to judge by.
        num_images: at most, of each of them.
        num_draws: timesteps of an image at which KL_t is measured; 0: all.
        seed: of the noise and the quantiles of t.
    """

    train: DataSet
    held_out: DataSet
    num_images: int
    num_draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_images < LEAST_IMAGES:
            raise UserError(f"--num-images is {self.num_images}; it must be at least {LEAST_IMAGES}")

    def judge(self, candidate: Candidate) -> Judged:
        """The averaged weights of a checkpoint.

        Raises:
            UserError: a number is not finite, or data cannot be read.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        n = min(self.num_images, self.held_out.rows.num_rows)
        pieces = [Piece(0, 0, start, min(start + PIECE_IMAGES, n)) for start in range(0, n, PIECE_IMAGES)]
        model, settings = candidate.config.model, Settings(num_draws=self.num_draws, seed=self.seed)
        pixels = Pixels((model.image_size, model.image_size, model.channels))
        bench = Bench([candidate], [()], self.train, self.held_out, pixels, settings, device)
        proposal = bench.proposal(0) if self.num_draws else None
        bits = BitsPerDim.merge(*(bench.bits(piece, proposal) for piece in pieces))
        found = Judged(
            candidate.position["images_seen"],
            tuple(map(float, bits.total)),
            self._loss(candidate, self.held_out, device),
            self._loss(candidate, self.train, device),
        )
        if not np.isfinite([*found.bits, found.held_out_loss, found.train_loss]).all():
            raise UserError(
                f"bits/dim of {candidate.uri} are not finite: its net is of no use; lower optim.lr"
            )
        return found

    @torch.no_grad()
    def _loss(self, candidate: Candidate, data_set: DataSet, device: torch.device) -> float:
        """The loss that was trained on, of the averaged weights: the same images, noise and uniforms for all trials."""
        config, total = candidate.config, 0.0
        objective, n = generation.build_objective(config), min(self.num_images, data_set.rows.num_rows)
        for start in range(0, n, PIECE_IMAGES):
            batch = images_of(data_set, start, min(start + PIECE_IMAGES, n))
            x_0 = images.to_model(torch.from_numpy(batch.image).to(device))
            label = torch.from_numpy(batch.label).to(device) if config.model.num_classes else None
            noise = generator(device, self.seed, HELD_OUT, start)
            total += objective.loss(candidate.net, x_0, label, noise).value.item() * len(x_0)
        return total / n
