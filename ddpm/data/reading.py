"""Plan and shards together: the images at given positions of the order.

Its own room because both runtimes read through it, with Ray (stream.py) and without.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow.fs as pafs
from numpy.typing import NDArray

from ddpm.config import Config, UserError
from ddpm.data.plan import Plan
from ddpm.data.shards import Manifest, Split, read_row_group

HELD_OUT = "test"
"""The split that training never learns from."""


@dataclass(frozen=True)
class Images:
    """Decoded images with their labels (zeros where the data set has none)."""

    image: NDArray[np.uint8]
    """[N, H, W, C]."""
    label: NDArray[np.int64]
    """[N]."""


@dataclass(frozen=True)
class DataSet:
    """One split of a data set that exists, opened through a filesystem."""

    filesystem: pafs.FileSystem
    root: str
    manifest: Manifest
    split: str

    def __post_init__(self) -> None:
        if self.split not in self.manifest.splits:
            raise UserError(
                f"{self.root} has no split {self.split!r}; it has {', '.join(sorted(self.manifest.splits))}"
            )

    @property
    def rows(self) -> Split:
        return self.manifest.splits[self.split]

    def held_out(self) -> "DataSet | None":
        """The split "test" of the same data set, unless that is the one trained on or there is none."""
        if self.split == HELD_OUT or HELD_OUT not in self.manifest.splits:
            return None
        return replace(self, split=HELD_OUT)

    def plan(self, seed: int, window_rows: int) -> Plan:
        """The order in which this split is seen."""
        return Plan(tuple(n for shard in self.rows.shards for n in shard.row_groups), seed, window_rows)

    def read(self, plan: Plan, start: int, stop: int) -> Images:
        """The images at positions [start, stop) of the plan, in order."""
        m, n = self.manifest, stop - start
        image = np.empty((n, m.height, m.width, m.channels), dtype=np.uint8)
        label = np.zeros(n, dtype=np.int64)
        for piece in plan.pieces(start, stop):
            pixels, labels = read_row_group(
                self.filesystem, self.root, m, self.split, piece.row_group, rows=piece.rows
            )
            image[piece.offsets] = pixels
            if labels is not None:
                label[piece.offsets] = labels
        return Images(image, label)


def check_fits(manifest: Manifest, config: Config, where: str) -> None:
    """Raise UserError where the data set and the net disagree about channels, size or classes."""
    if (manifest.height, manifest.width) != (config.model.image_size, config.model.image_size):
        raise UserError(
            f"{where} holds images of {manifest.height}x{manifest.width}, but model.image_size is "
            f"{config.model.image_size}; set --model.image-size, or prepare the data at that size"
        )
    if manifest.channels != config.model.channels:
        raise UserError(
            f"{where} holds images of {manifest.channels} channel(s), but model.channels is "
            f"{config.model.channels}; set --model.channels {manifest.channels}"
        )
    if config.model.num_classes not in (0, len(manifest.class_names)):
        raise UserError(
            f"{where} has {len(manifest.class_names)} classes, but model.num_classes is "
            f"{config.model.num_classes}; set --model.num-classes {len(manifest.class_names)}, or 0 to train "
            "without labels"
        )
