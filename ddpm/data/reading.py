"""Reading shards by the plan: images at given positions of the order, and one rank's micro-batches of them.

Ray's reading processes (ray_stream.py) and training without Ray use it.
"""

import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ddpm.config.tree import Config
from ddpm.data.manifest import Manifest, Split
from ddpm.data.plan import Plan, Window
from ddpm.data.row_group import RowGroup
from ddpm.data.shards import open_row_group
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

READERS = 4
"""Row groups fetched concurrently: storage latency is high, and a window has several."""
PART_BYTES = 8 << 20
"""Bytes of decoded images sent to each rank at once: large enough that sending costs little."""
HELD_OUT = "test"
"""The split held out from training."""
FIXED_WINDOW_ROWS = 8192
"""Images of a window of the fixed order, whatever the run's."""


@dataclass(frozen=True)
class LabelledImages:
    """Decoded images with their labels (zeros where the data set has none)."""

    image: NDArray[np.uint8]
    """[N, H, W, C]."""
    label: NDArray[np.int64]
    """[N]."""

    def __getitem__(self, part: slice) -> "LabelledImages":
        return LabelledImages(self.image[part], self.label[part])


@dataclass(frozen=True)
class MicroBatch(LabelledImages):
    """The unit of a global batch."""

    index: int
    """Position in the global batch, 0..M-1; with seed and step, the seed of its noise."""


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
        height, width, channels = self.manifest.shape
        return height // self.scale, width // self.scale, channels

    @property
    def key(self) -> str:
        """Cache key of these images."""
        suffix = f"-{self.scale}" if self.scale > 1 else ""
        return self.rows.fingerprint[:32] + suffix

    def held_out(self) -> "DataSet | None":
        """The split "test" of the same data set; None if this is it, or there is none."""
        if self.split == HELD_OUT or HELD_OUT not in self.manifest.splits:
            return None
        return replace(self, split=HELD_OUT)

    def plan(self, seed: int, window_rows: int) -> Plan:
        """The order in which this split is seen."""
        row_groups = tuple(size for shard in self.rows.shards for size in shard.row_groups)
        return Plan(row_groups, seed, window_rows)

    def fixed_order(self) -> "PlanReader":
        """A reader of the images in the order in which they are measured, the same for all runs."""
        return PlanReader(self, self.plan(0, FIXED_WINDOW_ROWS))

    def read(self, plan: Plan, start: int, stop: int) -> LabelledImages:
        """The images at positions [start, stop) of the plan, in order."""
        return PlanReader(self, plan).read(start, stop)

    def parts(
        self, plan: Plan, start: int, stop: int, max_images: int | None = None
    ) -> Iterator[LabelledImages]:
        """The images of `read`, in parts, as `PlanReader.parts`."""
        return PlanReader(self, plan).parts(start, stop, max_images)

    def part_images(self, world_size: int = 1) -> int:
        """Images of a part that `world_size` ranks share."""
        return max(1, PART_BYTES * world_size // math.prod(self.shape))

    def empty(self, n: int) -> LabelledImages:
        """`n` images to be filled in."""
        return LabelledImages(np.empty((n, *self.shape), np.uint8), np.zeros(n, np.int64))


class PlanReader:
    """The images of a data set in the order of a plan, one call at a time.

    The row groups of the window that was read last stay open, so that reading on in it opens none of them again.
    """

    def __init__(self, data_set: DataSet, plan: Plan) -> None:
        self._data_set = data_set
        self._plan = plan
        self._window_start = 0
        self._row_groups: dict[int, RowGroup] = {}

    def read(self, start: int, stop: int) -> LabelledImages:
        """The images at positions [start, stop), in order."""
        images = self._data_set.empty(stop - start)
        begin = 0
        for part in self.parts(start, stop, max(1, stop - start)):
            end = begin + len(part.label)
            images.image[begin:end] = part.image
            images.label[begin:end] = part.label
            begin = end
        return images

    def parts(self, start: int, stop: int, max_images: int | None = None) -> Iterator[LabelledImages]:
        """The images of `read`, in parts of at most `max_images` images (None: of PART_BYTES), each in one window."""
        max_images = max_images or self._data_set.part_images()
        for window in self._plan.windows(start, stop):
            low = max(start - window.start, 0)
            high = min(stop - window.start, len(window.rows))
            self._open(window, low, high)
            for begin in range(low, high, max_images):
                yield self._part(window, begin, min(begin + max_images, high))

    def _open(self, window: Window, low: int, high: int) -> None:
        """Open the row groups of the images [low, high) of the window, and close those of another window."""
        if window.start != self._window_start:
            self._row_groups.clear()
            self._window_start = window.start
        indices = set(window.row_groups[low:high].tolist())
        closed = sorted(indices - self._row_groups.keys())
        with ThreadPoolExecutor(READERS, thread_name_prefix="ddpm-read") as pool:
            self._row_groups.update(zip(closed, pool.map(self._row_group, closed), strict=True))

    def _row_group(self, index: int) -> RowGroup:
        of = self._data_set
        return retry_io(
            lambda: open_row_group(of.location, of.manifest, of.split, index),
            where=of.location.uri,
            timeout_s=of.timeout_s,
        )

    def _part(self, window: Window, low: int, high: int) -> LabelledImages:
        """The images [low, high) of the window, whose row groups are open."""
        images = self._data_set.empty(high - low)
        row_groups = window.row_groups[low:high]
        rows = window.rows[low:high]
        for index in np.unique(row_groups).tolist():
            offsets = np.flatnonzero(row_groups == index)
            image, label = self._row_groups[index].rows(rows[offsets], self._data_set.scale)
            images.image[offsets] = image
            if label is not None:
                images.label[offsets] = label
        return images


def cut(
    batches: Iterable[LabelledImages], share: range, micro_batch_size: int
) -> Generator[MicroBatch, None, None]:
    """Cut the images of one rank into micro-batches, and number them.

    Args:
        batches: the rank's images, in parts of any size.
        share: the rank's `plan.ReadOrder.share`.
    """
    indices = itertools.cycle(share)
    held: list[LabelledImages] = []
    """Parts of the next micro-batch."""
    for images in batches:
        first = micro_batch_size - sum(len(part.label) for part in held)
        edges = [0, *range(first, len(images.label) + 1, micro_batch_size)]
        for low, high in itertools.pairwise(edges):
            parts = [*held, images[low:high]]
            # Copies: `images` may be a read-only view of a block in shared memory, which is freed earlier this way.
            image = np.concatenate([part.image for part in parts])
            label = np.concatenate([part.label for part in parts])
            yield MicroBatch(image, label, next(indices))
            held = []
        if edges[-1] < len(images.label):
            held.append(images[edges[-1] :])


def scale_of(manifest: Manifest, image_size: int) -> int:
    """The factor that reduces encoded images to `image_size` squares; 1 if it is not a whole number."""
    is_square = manifest.height == manifest.width
    if manifest.encoding == "encoded" and is_square and manifest.height % image_size == 0:
        return manifest.height // image_size
    return 1


def check_fits(manifest: Manifest, config: Config, where: str) -> None:
    """Raise UserError if the data set and the net differ in channels, size or classes."""
    size = config.model.image_size
    stored_size = size * scale_of(manifest, size)
    net = (config.model.image_size, config.model.channels)
    if manifest.latents is not None and net != (manifest.height, manifest.channels):
        raise UserError(
            f"{where} holds latents of {manifest.height}x{manifest.width} in {manifest.channels} channels, but the net "
            f"sees {size}x{size} in {config.model.channels}; set --model.image-size {manifest.height} "
            f"--model.channels {manifest.channels}"
        )
    if (manifest.height, manifest.width) != (stored_size, stored_size):
        raise UserError(
            f"{where} holds images of {manifest.height}x{manifest.width}, but model.image_size is {size}; set "
            "--model.image-size, or prepare the data at that size"
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
