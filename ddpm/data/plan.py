"""The order of all images of all epochs: a pure function of the seed and the row groups.

The plan is the data set. In each epoch the row groups are permuted and grouped into windows, and the rows of
each window are permuted; epochs follow each other without a gap. A position in this endless order is
`images_seen`; a global batch is the next `batch_size` positions, and it consists of M micro-batches of fixed
size, the unit of all randomness. Seeking is arithmetic, not reading. The order does not depend on the number
of workers; only `rank_shard` does.

The order of the row groups is computed once per epoch; after that a position costs a binary search.

This module does not depend on Ray, files or pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ddpm.config.tree import Config
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import Purpose, key

Int64 = NDArray[np.int64]

CHUNK_IMAGES = 8192
"""Maximum images of one reading task, which fetches whole windows, at least one."""

IDLE_SHARE = 0.15
"""Share of the workers' time that may be lost to uneven shares without a warning."""

# Counters that separate the random order of row groups from that of rows.
_ROW_GROUPS = 0
_ROWS = 1


@dataclass(frozen=True)
class ReadOrder:
    """The order and batches of a training run's images. Reading depends only on these and a position."""

    batch_size: int
    """Images of a global batch, over all ranks."""
    micro_batch_size: int
    """Images of a micro-batch; batch_size must be a multiple of it."""
    total_images: int
    """Reading ends after this many images, rounded up to a global batch."""
    seed: int = 0
    window_rows: int = 8192
    """Images shuffled together: row groups are grouped into windows of about this many rows."""
    stall_timeout_s: float = 120.0
    """Seconds without a batch, beyond the time-out of storage, after which reading gives up."""

    @classmethod
    def from_config(cls, config: Config) -> "ReadOrder":
        """Take each field from config.train or config.data by its name."""
        values = vars(config.data) | vars(config.train)
        return cls(**{f.name: values[f.name] for f in fields(cls)})

    def share(self, rank: int, world_size: int) -> range:
        """The micro-batches of each global batch that `rank` trains on: r, r + n, r + 2n, ... of 0..M-1.

        If n does not divide M, some ranks take one more than the others.
        """
        size = self.batch_size
        micro = self.micro_batch_size
        if not 0 < micro <= size or size % micro:
            raise UserError(
                f"batch_size {size} is not a positive multiple of micro_batch_size {micro}; "
                "set --train.batch-size or --train.micro-batch-size"
            )
        if world_size > size // micro:
            raise UserError(
                f"a global batch of {size} is {size // micro} micro-batches of {micro}, too few for {world_size} "
                "workers; use fewer workers, or a smaller --train.micro-batch-size"
            )
        return range(rank, size // micro, world_size)


@dataclass(frozen=True)
class Window:
    """Images that are shuffled together: the order from position `start` on."""

    start: int
    row_groups: Int64
    """[n], row group of the image at each position."""
    rows: Int64
    """[n], row of the image in its row group."""


@dataclass(frozen=True)
class Plan:
    """The order of the images of one split.

    Args:
        row_groups: rows of every row group of the split, in the order of the manifest.
        seed: of the order.
        window_rows: rows of a window; it has window_rows / (rows of the largest row group) row groups, rounded up.
    """

    row_groups: tuple[int, ...]
    seed: int
    window_rows: int
    _epochs: dict[int, "_Epoch"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def num_images(self) -> int:
        """Images in an epoch."""
        return sum(self.row_groups)

    def tasks(self, start: int, stop: int, max_images: int = CHUNK_IMAGES) -> Iterator[tuple[int, int]]:
        """Cut the positions [start, stop) into reading tasks of at most `max_images` images, or of one window.

        Only the first task may begin and only the last may end inside a window, so a row group is read once per epoch.
        """
        while start < stop:
            end = self._window_end(start)
            while end < stop and (further := self._window_end(end)) - start <= max_images:
                end = further
            yield start, min(end, stop)
            start = end

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """The whole windows that contain the positions [start, stop), in order, over any number of epochs."""
        for number in range(start // self.num_images, -(-stop // self.num_images)):
            epoch = self._epoch(number)
            begin = number * self.num_images
            first = int(np.searchsorted(epoch.edges, start - begin, side="right")) - 1
            last = int(np.searchsorted(epoch.edges, min(stop - begin, self.num_images), side="left"))
            for w in range(max(first, 0), last):
                groups = epoch.order[w * epoch.groups_per_window : (w + 1) * epoch.groups_per_window]
                begins = np.concatenate([[0], np.cumsum(self._sizes[groups])])
                shuffled = permutation(int(begins[-1]), self.seed, Purpose.ORDER, number, _ROWS, w)
                group = np.searchsorted(begins, shuffled, side="right") - 1
                yield Window(begin + int(epoch.edges[w]), groups[group], shuffled - begins[group])

    def _window_end(self, position: int) -> int:
        """The end of the window that contains `position`."""
        number, inside = divmod(position, self.num_images)
        edges = self._epoch(number).edges
        after = int(np.searchsorted(edges, inside, side="right"))
        return number * self.num_images + (int(edges[after]) if after < len(edges) else self.num_images)

    def _epoch(self, number: int) -> "_Epoch":
        if (epoch := self._epochs.get(number)) is None:
            for other in sorted(self._epochs)[:-1]:  # keep two: reading crosses from one to the next
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
    """[windows, or one more], start of each window in the epoch."""
    groups_per_window: int


def permutation(n: int, *counters: int) -> Int64:
    """A permutation of range(n) that depends on `counters` alone.

    Sorts raw 64-bit words of a Philox counter: numpy guarantees that stream in all versions, unlike
    Generator.permutation, and a run may outlast a version of numpy.
    """
    bits = np.random.Philox(key=key(*counters)).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)


def check_batches(config: Config) -> None:
    """Raise UserError if the run may have more workers than a global batch has micro-batches."""
    ReadOrder.from_config(config).share(0, config.cluster.world_sizes()[-1])


def uneven_share(config: Config) -> str | None:
    """A warning if workers wait for those that take one micro-batch more; None: for IDLE_SHARE of a step at most."""
    order = ReadOrder.from_config(config)
    idle = {}
    for world_size in config.cluster.world_sizes():
        share = order.share(0, world_size)  # rank 0 takes the most
        idle[world_size] = 1 - share.stop / (world_size * len(share))
    world_size, waste = max(idle.items(), key=lambda item: item[1])
    if waste <= IDLE_SHARE:
        return None
    share = order.share(0, world_size)
    return (
        f"{world_size} workers share {share.stop} micro-batches unevenly: some take {len(share)}, and the others wait "
        f"for them ({waste:.0%} of the workers' time); a smaller --train.micro-batch-size than "
        f"{order.micro_batch_size} is shared more evenly"
    )


def last_position(images_seen: int, total_images: int, batch_size: int) -> int:
    """The final position of training that resumes at `images_seen`: after whole global batches."""
    return images_seen + -(-max(0, total_images - images_seen) // batch_size) * batch_size


def rank_shard(rows: NDArray, start: int, share: range, micro_batch_size: int) -> NDArray:
    """The rows that a rank trains on.

    Args:
        rows: [N, ...], at the positions from `start` on, counted from the beginning of a global batch.
        share: the rank's `ReadOrder.share`.

    Returns:
        [n, ...], in order; the first and last micro-batch may be partial, with the rest in the adjacent ranges.
    """
    if share.step == 1:
        return rows
    micro_batch = (start + np.arange(len(rows))) // micro_batch_size % share.stop
    return rows[micro_batch % share.step == share.start]
