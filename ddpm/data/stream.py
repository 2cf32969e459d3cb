"""The plan as a Ray Dataset: images stream from shards to the workers in the plan's exact order.

One input row is one reading task, a range of whole global batches. The task reads and decodes the range, and
emits one row for each worker: that worker's micro-batches in a single tensor. A row is a block, blocks keep
their order, and Ray's splitter deals them round-robin, so row k goes to worker k mod n. Nothing is shuffled,
re-blocked or copied on the way.

The cursor is where the workers' restored checkpoint stands: rank 0 calls `split` and hands the iterators to
the others.
"""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.data
from ray.data import DataContext, DataIterator

from ddpm import storage
from ddpm.config import Config, UserError
from ddpm.data.plan import chunks, share
from ddpm.data.reading import DataSet, check_fits
from ddpm.data.shards import read_manifest
from ddpm.training.runtime import CHUNK_IMAGES, MicroBatch, cut

MAX_TASKS = 1000
"""Reading tasks of one Ray Dataset; training that needs more goes on with the next Dataset."""
OBJECT_STORE_BYTES = 256 << 20
"""How far reading may run ahead of training, in memory of the object store."""


def open_data_set(config: Config) -> DataSet:
    """The split config.data.split of the data set at config.data.shards.

    Raises:
        UserError: there is no data set, it has no such split, or it does not fit the net.
    """
    uri = config.data.shards
    if uri is None:
        raise UserError("data.shards is not given; expected the folder or URI of a data set")
    location = storage.resolve(uri)
    manifest = read_manifest(location.filesystem, location.path, uri)
    check_fits(manifest, config, uri)
    return DataSet(location.filesystem, location.path, manifest, config.data.split)


def hide_progress() -> None:
    """Keep Ray Data's own bars off the terminal, for Datasets made in this process."""
    DataContext.get_current().enable_progress_bars = False


def legs(config: Config, images_seen: int) -> list[list[tuple[int, int]]]:
    """The reading tasks of the rest of training, in Datasets of at most MAX_TASKS."""
    train = config.train
    todo = chunks(images_seen, train.total_images, train.batch_size, CHUNK_IMAGES)
    return [todo[i : i + MAX_TASKS] for i in range(0, len(todo), MAX_TASKS)]


def split(
    config: Config, data_set: DataSet, todo: list[tuple[int, int]], world_size: int
) -> list[DataIterator]:
    """One iterator a worker over the reading tasks `todo`; called by rank 0 alone."""
    context = DataContext.get_current()
    # Blocks of one row: the output buffer cuts a block as soon as it holds more than this.
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=OBJECT_STORE_BYTES
    )
    task: Any = _ReadTask(config, data_set, todo, world_size)
    # One block a task: each is read by its own Ray task, and as many at once as there are free CPUs.
    rows = ray.data.range(len(todo), override_num_blocks=len(todo))
    return rows.map_batches(task, batch_size=1, batch_format="numpy").streaming_split(world_size, equal=True)


def micro_batches(iterator: DataIterator, config: Config, rank: int, world_size: int) -> Iterator[MicroBatch]:
    """Rank `rank`'s micro-batches from its iterator.

    Raises:
        UserError: no data for config.data.stall_timeout_s.
    """
    train = config.train
    for row in _with_timeout(iterator, config.data.stall_timeout_s):
        image, label = row["image"][0], row["label"][0]
        yield from cut(image, label, rank, world_size, train.batch_size, train.micro_batch_size)


class _ReadTask:
    """What a reading task does; made once on rank 0, run wherever Ray has a free CPU."""

    def __init__(
        self, config: Config, data_set: DataSet, todo: list[tuple[int, int]], world_size: int
    ) -> None:
        self._data_set, self._todo, self._world_size = data_set, todo, world_size
        self._train = config.train
        self._plan = data_set.plan(config.train.seed, config.data.window_rows)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        images = self._data_set.read(self._plan, *self._todo[int(batch["id"][0])])
        sizes = (self._train.batch_size, self._train.micro_batch_size)
        for rank in range(self._world_size):
            yield {
                "image": share(images.image, rank, self._world_size, *sizes)[None],
                "label": share(images.label, rank, self._world_size, *sizes)[None],
            }


def _with_timeout(iterator: DataIterator, timeout_s: float) -> Iterator[dict[str, Any]]:
    """The rows of `iterator`, fetched one ahead in a thread; Ray itself would wait for a free CPU without a word."""
    rows: queue.Queue = queue.Queue(maxsize=1)
    end = object()

    def fetch() -> None:
        try:
            for row in iterator.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=1):
                rows.put(row)
            rows.put(end)
        except BaseException as error:  # handed to the consumer, whatever it is
            rows.put(error)

    threading.Thread(target=fetch, name="ddpm-data", daemon=True).start()
    while True:
        try:
            row = rows.get(timeout=timeout_s)
        except queue.Empty:
            raise UserError(
                f"no data for {timeout_s:g} s (data.stall_timeout_s): either storage does not answer, or no CPU "
                "is free for the tasks that read; lower --cluster.cpus-per-worker or add CPUs to the cluster"
            ) from None
        if row is end:
            return
        if isinstance(row, BaseException):
            raise row
        yield row
