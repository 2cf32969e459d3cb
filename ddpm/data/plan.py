"""The order of all images of all epochs: a pure function of the seed and the row groups.

The plan is the data set. In each epoch the row groups are permuted and dealt into windows, and the rows of a
window are permuted among each other; epoch follows epoch without a seam. A position in this endless order is
`images_seen`; a global batch is the next `batch_size` positions, and it consists of M micro-batches of fixed
size, the grain of everything random. Seeking is arithmetic, not reading, and no number of workers appears
anywhere but in `share`.

Nothing here knows of Ray, of files or of pixels.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm.config import UserError

Int64 = NDArray[np.int64]

CHUNK_IMAGES = 8192
"""Images that one reading task fetches, at most: about a window, so that tasks and blocks are few and large."""

# Counters that keep the random streams of different purposes apart.
_ROW_GROUPS, _ROWS = 0, 1


@dataclass(frozen=True)
class Piece:
    """Rows of one row group, and where in the requested range they belong."""

    row_group: int
    rows: Int64
    """[n], rows inside the row group."""
    offsets: Int64
    """[n], positions minus the start of the requested range."""


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

    @property
    def num_images(self) -> int:
        """Images in an epoch."""
        return sum(self.row_groups)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """What to read for the positions [start, stop), row group by row group.

        Every position is covered exactly once; a range may span any number of epochs.
        """
        for window in self.windows(start, stop):
            low, high = max(start - window.start, 0), min(stop - window.start, len(window.rows))
            row_groups, rows = window.row_groups[low:high], window.rows[low:high]
            offsets = np.arange(low, high, dtype=np.int64) + (window.start - start)
            for row_group in np.unique(row_groups).tolist():
                inside = row_groups == row_group
                yield Piece(row_group, rows[inside], offsets[inside])

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """The windows that the positions [start, stop) lie in, in order and whole."""
        for epoch in range(start // self.num_images, -(-stop // self.num_images)):
            begin = epoch * self.num_images
            yield from self._epoch_windows(epoch, max(start - begin, 0), min(stop - begin, self.num_images))

    def _epoch_windows(self, epoch: int, start: int, stop: int) -> Iterator[Window]:
        sizes = np.asarray(self.row_groups, dtype=np.int64)
        order = permutation(len(sizes), self.seed, epoch, _ROW_GROUPS)
        groups_per_window = max(1, -(-self.window_rows // int(sizes.max())))
        # edges[w]: position of the first image of window w in this epoch.
        edges = np.concatenate([[0], np.cumsum(sizes[order])])[::groups_per_window]
        first = int(np.searchsorted(edges, start, side="right")) - 1
        last = int(np.searchsorted(edges, stop, side="left"))
        for w in range(first, last):
            groups = order[w * groups_per_window : (w + 1) * groups_per_window]
            begins = np.concatenate([[0], np.cumsum(sizes[groups])])
            shuffled = permutation(int(begins[-1]), self.seed, epoch, _ROWS, w)
            group = np.searchsorted(begins, shuffled, side="right") - 1
            position = epoch * self.num_images + int(edges[w])
            yield Window(position, groups[group], shuffled - begins[group])


def permutation(n: int, *key: int) -> Int64:
    """A permutation of range(n) that depends on `key` alone.

    Sorting raw 64-bit words of a Philox counter: numpy promises that stream for all its versions, which it
    does not for Generator.permutation, and a run may outlive a numpy.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)


def micro_batches_per_step(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """M, the micro-batches of a global batch.

    Raises:
        UserError: M is not whole, or does not divide by the number of workers.
    """
    if micro_batch_size < 1 or batch_size % micro_batch_size:
        raise UserError(
            f"train.batch_size {batch_size} is not a multiple of train.micro_batch_size {micro_batch_size}"
        )
    m = batch_size // micro_batch_size
    if m % world_size:
        right = [n for n in range(1, m + 1) if m % n == 0]
        raise UserError(
            f"a global batch of {batch_size} is {m} micro-batches of {micro_batch_size}, which {world_size} workers "
            f"cannot share evenly; use {' or '.join(map(str, right))} workers, or a smaller train.micro_batch_size"
        )
    return m


def chunks(start: int, stop: int, batch_size: int, chunk_images: int) -> list[tuple[int, int]]:
    """Cut the positions from `start` up to `stop` (rounded up to a global batch) into reading tasks.

    Each is a whole number of global batches, of about `chunk_images`; the first ones are shorter, so that
    training begins before the first full one is read.
    """
    cuts = [start]
    size = batch_size
    while cuts[-1] < stop:
        whole = max(1, min(size, chunk_images) // batch_size) * batch_size
        remaining = -(-(stop - cuts[-1]) // batch_size) * batch_size
        cuts.append(cuts[-1] + min(whole, remaining))
        size *= 4
    return list(itertools.pairwise(cuts))


def share(rows: NDArray, rank: int, world_size: int, batch_size: int, micro_batch_size: int) -> NDArray:
    """The rows that `rank` of `world_size` trains on, of a range of whole global batches.

    Of each global batch rank r takes micro-batches r, r + n, r + 2n, ...

    Args:
        rows: [K * batch_size, ...], K global batches in order.

    Returns:
        [K * batch_size / world_size, ...], micro-batch after micro-batch.
    """
    trailing = rows.shape[1:]
    steps = rows.reshape(-1, batch_size // micro_batch_size, micro_batch_size, *trailing)
    return steps[:, rank::world_size].reshape(-1, *trailing)
