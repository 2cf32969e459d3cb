"""The order of all images of all epochs: a pure function of the seed and the row groups.

The plan is the data set. In each epoch the row groups are permuted and dealt into windows, and the rows of a
window are permuted among each other; epoch follows epoch without a seam. A position in this endless order is
`images_seen`; a global batch is the next `batch_size` positions, and it consists of M micro-batches of fixed
size, the grain of everything random. Seeking is arithmetic, not reading, and no number of workers appears
anywhere but in `rank_shard`.

The order of the row groups is computed once an epoch; from then on a position costs a binary search.

Nothing here knows of Ray, of files or of pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ddpm.config import Config
from ddpm.data.corrupt import OnCorrupt
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import Purpose, key

Int64 = NDArray[np.int64]

CHUNK_IMAGES = 8192
"""Images that one reading task fetches: whole windows, as many as hold no more, but one at least."""

# Counters that keep the order of row groups and that of rows apart.
_ROW_GROUPS, _ROWS = 0, 1


@dataclass(frozen=True)
class ReadOrder:
    """The images of a training run, in order and in batches: with a position, all that reading depends on."""

    batch_size: int
    """Images of a global batch, over all ranks."""
    micro_batch_size: int
    """Images of a micro-batch; batch_size / micro_batch_size must divide by the number of ranks."""
    total_images: int
    """Reading ends when so many images have been seen, rounded up to a global batch."""
    seed: int = 0
    window_rows: int = 8192
    """Images shuffled among each other: row groups are grouped into windows of at least so many rows."""
    on_corrupt: OnCorrupt = "error"
    """An image that cannot be read: raise, or put another of its window in its place."""
    stall_timeout_s: float = 120.0
    """Seconds without a batch, beyond the time-out of storage, after which reading gives up."""

    @classmethod
    def from_config(cls, config: Config) -> "ReadOrder":
        """Each field under its own name from config.train or config.data."""
        values = vars(config.data) | vars(config.train)
        return cls(**{f.name: values[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class Window:
    """Images that are shuffled among each other: the order from position `start` on."""

    start: int
    row_groups: Int64
    """[n], of the image at each position."""
    rows: Int64
    """[n], inside the row group."""


@dataclass(frozen=True)
class Plan:
    """The order of the images of one split.

    Args:
        row_groups: rows of every row group of the split, in the order of the manifest.
        seed: of the order.
        window_rows: a window has as many row groups as hold at least so many rows.
    """

    row_groups: tuple[int, ...]
    seed: int
    window_rows: int
    _epochs: dict[int, "_Epoch"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def num_images(self) -> int:
        """Images in an epoch."""
        return sum(self.row_groups)

    def tasks(self, start: int, stop: int, most: int = CHUNK_IMAGES) -> Iterator[tuple[int, int]]:
        """Cut the positions [start, stop) into reading tasks of at most `most` images, or of one window.

        Only the first begins and only the last ends inside a window, so that a row group is read once an epoch.
        """
        while start < stop:
            end = self._window_end(start)
            while end < stop and (further := self._window_end(end)) - start <= most:
                end = further
            yield start, min(end, stop)
            start = end

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """The windows that the positions [start, stop) lie in, in order and whole; of any number of epochs."""
        for epoch in range(start // self.num_images, -(-stop // self.num_images)):
            begin = epoch * self.num_images
            yield from self._epoch_windows(epoch, max(start - begin, 0), min(stop - begin, self.num_images))

    def _epoch_windows(self, number: int, start: int, stop: int) -> Iterator[Window]:
        epoch, begin = self._epoch(number), number * self.num_images
        first = int(np.searchsorted(epoch.edges, start, side="right")) - 1
        last = int(np.searchsorted(epoch.edges, stop, side="left"))
        for w in range(first, last):
            groups = epoch.order[w * epoch.groups_per_window : (w + 1) * epoch.groups_per_window]
            begins = np.concatenate([[0], np.cumsum(self._sizes[groups])])
            shuffled = permutation(int(begins[-1]), self.seed, Purpose.ORDER, number, _ROWS, w)
            group = np.searchsorted(begins, shuffled, side="right") - 1
            yield Window(begin + int(epoch.edges[w]), groups[group], shuffled - begins[group])

    def _window_end(self, position: int) -> int:
        """The end of the window that `position` lies in."""
        number, inside = divmod(position, self.num_images)
        edges = self._epoch(number).edges
        after = int(np.searchsorted(edges, inside, side="right"))
        return number * self.num_images + (int(edges[after]) if after < len(edges) else self.num_images)

    def _epoch(self, number: int) -> "_Epoch":
        if (epoch := self._epochs.get(number)) is None:
            for other in sorted(self._epochs)[:-1]:  # two are kept: the order goes on from one to the next
                self._epochs.pop(other, None)
            order = permutation(len(self._sizes), self.seed, Purpose.ORDER, number, _ROW_GROUPS)
            groups_per_window = max(1, -(-self.window_rows // int(self._sizes.max())))
            edges = np.concatenate([[0], np.cumsum(self._sizes[order])])[::groups_per_window]
            self._epochs[number] = epoch = _Epoch(order, edges, groups_per_window)
        return epoch

    @cached_property
    def _sizes(self) -> Int64:
        return np.asarray(self.row_groups, dtype=np.int64)


@dataclass(frozen=True)
class _Epoch:
    """The row groups of an epoch, in order."""

    order: Int64
    edges: Int64
    """[windows, maybe one more], where in the epoch each window begins."""
    groups_per_window: int


def permutation(n: int, *counters: int) -> Int64:
    """A permutation of range(n) that depends on `counters` alone.

    Sorting raw 64-bit words of a Philox counter: numpy promises that stream for all its versions, which it
    does not for Generator.permutation, and a run may outlive a numpy.
    """
    bits = np.random.Philox(key=key(*counters)).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)


def micro_batches_per_step(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """M, the micro-batches of a global batch.

    Raises:
        UserError: M is not whole, or does not divide by the number of workers.
    """
    if not 0 < micro_batch_size <= batch_size or batch_size % micro_batch_size:
        raise UserError(
            f"batch_size {batch_size} is not a positive multiple of micro_batch_size {micro_batch_size}; "
            "set --train.batch-size or --train.micro-batch-size"
        )
    m = batch_size // micro_batch_size
    if m % world_size:
        right = [n for n in range(1, m + 1) if m % n == 0]
        raise UserError(
            f"a global batch of {batch_size} is {m} micro-batches of {micro_batch_size}, which {world_size} workers "
            f"cannot share evenly; use {' or '.join(map(str, right))} workers, or a smaller micro_batch_size"
        )
    return m


def check_batches(config: Config) -> None:
    """Raise UserError for batches that cannot be shared evenly, with every number of workers the run may have."""
    for world_size in config.cluster.world_sizes():
        micro_batches_per_step(config.train.batch_size, config.train.micro_batch_size, world_size)


def last_position(images_seen: int, total_images: int, batch_size: int) -> int:
    """The position at which training that resumes at `images_seen` ends: after whole global batches."""
    return images_seen + -(-max(0, total_images - images_seen) // batch_size) * batch_size


def rank_shard(rows: NDArray, start: int, rank: int, world_size: int, micro_batch_size: int) -> NDArray:
    """The rows that `rank` of `world_size` trains on.

    Of each global batch rank r takes micro-batches r, r + n, r + 2n, ...

    Args:
        rows: [N, ...], of the positions from `start` on, counted from where a global batch begins.

    Returns:
        [n, ...], in order; the first and last micro-batch may be parts, whose rest is in the ranges beside this one.
    """
    if world_size == 1:
        return rows
    micro_batch = (start + np.arange(len(rows))) // micro_batch_size
    return rows[micro_batch % world_size == rank]
