"""Reading shards by the plan: images at given positions of the order, and one rank's micro-batches of them.

Ray's reading processes (ray_dataset.py) and training without Ray use it.
"""

import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ddpm.config import Config
from ddpm.data.corrupt import CorruptData, OnCorrupt, Substitution
from ddpm.data.manifest import Manifest, Split
from ddpm.data.plan import Plan, Window
from ddpm.data.row_group import RowGroup, Rows
from ddpm.data.shards import locate, open_row_group
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

RankBatch = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images [n, H, W, C] and labels [n] of one rank, in some range of the order."""
RowGroups = dict[int, RowGroup | CorruptData]
"""Fetched row groups of a split by index, or the errors of unreadable ones."""
StandIns = dict[int, tuple[int, Rows]]
"""The substitute for the unreadable image at an index of a window: another index, and the image there."""
READERS = 4
"""Row groups fetched concurrently: storage latency is high, and a window has several."""
PART_BYTES = 8 << 20
"""Bytes of decoded images sent to each rank at once: large enough that sending costs little."""
HELD_OUT = "test"
"""The split held out from training."""


@dataclass(frozen=True)
class Images:
    """Decoded images with their labels (zeros where the data set has none)."""

    image: NDArray[np.uint8]
    """[N, H, W, C]."""
    label: NDArray[np.int64]
    """[N]."""
    substitutions: tuple[Substitution, ...] = ()
    """Substitutions, in the order of positions."""


@dataclass(frozen=True)
class MicroBatch:
    """The unit of a global batch."""

    index: int
    """Position in the global batch, 0..M-1; with seed and step, the seed of its noise."""
    image: NDArray[np.uint8]
    """[B, H, W, C]."""
    label: NDArray[np.int64]
    """[B]."""


@dataclass(frozen=True)
class DataSet:
    """One split of an existing data set."""

    location: Location
    manifest: Manifest
    split: str
    timeout_s: float = 0.0
    """Seconds that storage may fail before reading gives up (run.storage_timeout_s)."""
    scale: int = 1
    """Images are decoded at 1 / scale of their stored size (`scale_of`)."""

    def __post_init__(self) -> None:
        if self.split not in self.manifest.splits:
            raise UserError(
                f"{self.location.uri} has no split {self.split!r}; it has {', '.join(sorted(self.manifest.splits))}"
            )

    @property
    def rows(self) -> Split:
        return self.manifest.splits[self.split]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        m = self.manifest
        return m.height // self.scale, m.width // self.scale, m.channels

    @property
    def key(self) -> str:
        """Cache key of these images."""
        return self.rows.fingerprint[:32] + (f"-{self.scale}" if self.scale > 1 else "")

    def held_out(self) -> "DataSet | None":
        """The split "test" of the same data set; None if this is it, or there is none."""
        if self.split == HELD_OUT or HELD_OUT not in self.manifest.splits:
            return None
        return replace(self, split=HELD_OUT)

    def plan(self, seed: int, window_rows: int) -> Plan:
        """The order in which this split is seen."""
        return Plan(tuple(n for shard in self.rows.shards for n in shard.row_groups), seed, window_rows)

    def read(self, plan: Plan, start: int, stop: int, on_corrupt: OnCorrupt = "error") -> Images:
        """The images at positions [start, stop) of the plan, in order.

        Args:
            on_corrupt: "substitute": the next readable image of the window, with its label, replaces an unreadable one
                (the first position follows the last). So the result depends on the plan and the data alone.

        Raises:
            CorruptData: an image cannot be read (names shard, row group and row), or none of a whole window can.
            StorageError: storage has failed for longer than timeout_s.
        """
        read, position = self.empty(stop - start), 0
        substitutions: list[Substitution] = []
        for part in self.parts(plan, start, stop, max(1, stop - start), on_corrupt):
            end = position + len(part.label)
            read.image[position:end], read.label[position:end] = part.image, part.label
            substitutions += part.substitutions
            position = end
        return replace(read, substitutions=tuple(substitutions))

    def parts(
        self, plan: Plan, start: int, stop: int, most: int | None = None, on_corrupt: OnCorrupt = "error"
    ) -> Iterator[Images]:
        """The images of `read`, in parts of at most `most` images (None: of PART_BYTES).

        Each part lies in one window. The row groups of a window are read once and kept until the next window.
        """
        most = most or self.part_images()
        for window in plan.windows(start, stop):
            low, high = max(start - window.start, 0), min(stop - window.start, len(window.rows))
            groups: RowGroups = {}
            for index, group in self._row_groups(np.unique(window.row_groups[low:high]).tolist()):
                groups[index] = group
                if isinstance(group, CorruptData) and on_corrupt == "error":
                    raise group
            for begin in range(low, high, most):
                yield self._part(window, begin, min(begin + most, high), groups, on_corrupt)

    def _part(self, window: Window, low: int, high: int, groups: RowGroups, on_corrupt: OnCorrupt) -> Images:
        """The images [low, high) of the window."""
        images, bad = self.empty(high - low), dict[int, CorruptData]()
        for index in np.unique(window.row_groups[low:high]).tolist():
            (offsets,) = np.nonzero(window.row_groups[low:high] == index)
            rows = self.rows_of(groups[index], window.rows[low:high][offsets])
            for i, error in rows.unreadable.items():
                if on_corrupt == "error":
                    raise error
                bad[low + int(offsets[i])] = error
            _put(images, offsets, rows)
        stand_ins: StandIns = {}
        for i in sorted(bad, reverse=True):  # so that images with the same stand-in search for it once
            stand_ins[i] = self._stand_in(window, i, bad[i], groups, stand_ins)
        substitutions = []
        for i, error in sorted(bad.items()):
            stand_in, rows = stand_ins[i]
            _put(images, np.array([i - low]), rows)
            names = *self._name(window, i), error.reason, *self._name(window, stand_in)
            substitutions.append(Substitution(window.start + i, *names))
        return replace(images, substitutions=tuple(substitutions))

    def _stand_in(
        self, window: Window, index: int, error: CorruptData, groups: RowGroups, known: StandIns
    ) -> tuple[int, Rows]:
        """The index of the next readable image of the window after `index`, and that image.

        Args:
            groups: row groups that were opened already; others are added.
            known: results of this method for other images.
        """
        size = len(window.rows)
        for i in ((index + k) % size for k in range(1, size)):
            if i in known:
                return known[i]
            if (group := int(window.row_groups[i])) not in groups:
                groups[group] = self.row_group(group)
            rows = self.rows_of(groups[group], window.rows[i : i + 1])
            if not rows.unreadable:
                return i, rows
        raise CorruptData(f"no image of the {size} in its window can replace {error}", error.reason)

    def _name(self, window: Window, index: int) -> tuple[str, int, int]:
        """Shard, row group and row of the image at `index` of the window."""
        shard, inside = locate(self.rows, int(window.row_groups[index]))
        return shard.path, inside, int(window.rows[index])

    def _row_groups(self, indices: list[int]) -> Iterator[tuple[int, RowGroup | CorruptData]]:
        """The row groups, in order; several are fetched at once."""
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="ddpm-read")
        try:
            yield from zip(indices, pool.map(self.row_group, indices), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def part_images(self, world_size: int = 1) -> int:
        """Images of a part that `world_size` ranks share."""
        return max(1, PART_BYTES * world_size // math.prod(self.shape))

    def empty(self, n: int) -> Images:
        """`n` images to be filled in."""
        return Images(np.empty((n, *self.shape), np.uint8), np.zeros(n, np.int64))

    def rows_of(self, group: RowGroup | CorruptData, rows: NDArray[np.int64]) -> Rows:
        """Decode rows of a row group; all are unreadable if the row group is."""
        if isinstance(group, RowGroup):
            return group.rows(rows, self.scale)
        return Rows(np.zeros(0, np.uint8), None, dict.fromkeys(range(len(rows)), group))

    def row_group(self, index: int) -> RowGroup | CorruptData:
        """Row group `index` of the split, or why none of its rows can be read."""
        try:
            return retry_io(
                lambda: open_row_group(self.location, self.manifest, self.split, index),
                where=self.location.uri,
                timeout_s=self.timeout_s,
            )
        except CorruptData as error:
            return error


def _put(images: Images, places: NDArray[np.int64], rows: Rows) -> None:
    if len(rows.image):
        images.image[places] = rows.image
        if rows.label is not None:
            images.label[places] = rows.label


def cut(
    batches: Iterable[RankBatch], rank: int, world_size: int, batch_size: int, micro_batch_size: int
) -> Generator[MicroBatch, None, None]:
    """Cut the images of one rank into micro-batches, and number them.

    Args:
        batches: the rank's images and labels, in parts of any size.
    """
    per_step = batch_size // micro_batch_size // world_size
    indices = (k % per_step * world_size + rank for k in itertools.count())
    begun: list[RankBatch] = []  # parts of the next micro-batch
    for image, label in batches:
        first = micro_batch_size - sum(len(part) for _, part in begun)
        edges = [0, *range(first, len(label) + 1, micro_batch_size)]
        for low, high in itertools.pairwise(edges):
            images, labels = zip(*begun, (image[low:high], label[low:high]), strict=True)
            # Copies: `image` may be a read-only view of a block in shared memory, which is freed earlier this way.
            yield MicroBatch(next(indices), np.concatenate(images), np.concatenate(labels))
            begun = []
        if edges[-1] < len(label):
            begun.append((image[edges[-1] :], label[edges[-1] :]))


def scale_of(manifest: Manifest, image_size: int) -> int:
    """The factor that reduces encoded images to `image_size` squares; 1 if it is not a whole number."""
    square = manifest.height == manifest.width and manifest.height % image_size == 0
    return manifest.height // image_size if manifest.encoding == "encoded" and square else 1


def check_fits(manifest: Manifest, config: Config, where: str) -> None:
    """Raise UserError if the data set and the net differ in channels, size or classes."""
    size, scale = config.model.image_size, scale_of(manifest, config.model.image_size)
    if (manifest.height, manifest.width) != (size * scale, size * scale):
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
