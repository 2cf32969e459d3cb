"""The plan as a Ray Dataset: images stream from shards to the workers in the plan's exact order.

An input row is a reading task, a range of whole windows, but for the ends of a Dataset. The task reads the row groups
of a window once, decodes them in parts, and emits one row per part and rank: that rank's images of the part, in a
single tensor. A row is a block, blocks keep their order, and Ray's splitter deals them round-robin, so row k goes to
rank k mod n. Nothing is shuffled, re-blocked or copied on the way. If a window's edge cuts a micro-batch, its rank
joins the parts. That a rank gets its own rows in order is checked: a row names its rank and the positions of its part.

An error is sent as a row as well: raised inside Ray, it would be wrapped, logged and retried. The row holds the
message, and the rank that receives the row raises the error.

This module and its imports do not import torch, which would double the start-up time of reading processes.
"""

import itertools
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import DataIterator

from ddpm.cluster import ray_init
from ddpm.config.tree import Config
from ddpm.data.manifest import read_manifest
from ddpm.data.plan import Plan, ReadOrder, last_position, rank_shard
from ddpm.data.reading import DataSet, LabelledImages, MicroBatch, check_fits, cut, scale_of
from ddpm.data.row_group import CorruptData
from ddpm.runs import storage
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError

MAX_TASKS = 1000
"""Maximum reading tasks of one Ray Dataset; longer training uses several Datasets in turn."""
BYTES_PER_WORKER = 256 << 20
"""Reading ahead of training may take this much of the object store for each worker."""
OBJECT_STORE_SHARE = 0.25
"""Reading ahead of training may take this share of the object store in all."""
READING_PRIORITY = 10
"""The least nice value of reading, which is ahead of training: on CPUs, training that does not wait goes first."""
LOOP_STEP_S = 0.02
"""Shortest time between two steps of Ray Data's scheduling loop."""
TaskRange = tuple[int, int]
"""Positions of the plan from start to stop."""
_ERRORS: dict[str, type[UserError]] = {"CorruptData": CorruptData, "StorageError": StorageError}
"""Errors of reading that travel as rows."""


class WrongOrder(UserError):
    """Ray delivered other images than the rank's next ones; a restart would not help."""

    exit_code = 1


def open_data_set(
    uri: str, split: str = "train", *, image_size: int | None = None, timeout_s: float = 300.0
) -> DataSet:
    """One split of the data set at a folder or s3:// URI; its manifest is read and validated.

    Args:
        image_size: decode images at this size if their stored size is a multiple of it; None: at the stored size.
        timeout_s: how long storage may fail before opening and reading give up.
    """
    location = storage.resolve(uri)
    manifest = read_manifest(location, timeout_s)
    scale = scale_of(manifest, image_size) if image_size else 1
    return DataSet(location, manifest, split, timeout_s, scale)


def open_configured(config: Config) -> DataSet:
    """The split config.data.split of the data set at config.data.shards."""
    uri = config.data.shards
    if uri is None:
        raise UserError("data.shards is not given; expected the folder or URI of a data set")
    data_set = open_data_set(
        uri,
        config.data.split,
        image_size=config.model.image_size,
        timeout_s=config.run.storage_timeout_s,
    )
    check_fits(data_set.manifest, config, uri)
    return data_set


def micro_batches(
    data_set: DataSet,
    order: ReadOrder,
    images_seen: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    broadcast: Callable[[Any], Any] = lambda value: value,
) -> Generator[MicroBatch, None, None]:
    """One rank's micro-batches, from the global batch at `images_seen` to the end of the order.

    Every rank must use the same position and take the same number of global batches. Reading begins with the call,
    not with the first `next`, and ends when the generator is exhausted, closed or dropped by all ranks.

    Args:
        images_seen: a position where a global batch begins; the only state of reading that a checkpoint needs.
        broadcast: returns, on every rank, the value it was given on rank 0:
            ray.train.collective.broadcast_from_rank_zero.

    Raises:
        CorruptData, StorageError: as reading raised it in another process.
        WrongOrder: Ray delivered other images than this rank's next ones.
        UserError: no data came for order.stall_timeout_s + data_set.timeout_s.
    """
    if images_seen < 0:
        raise UserError(f"images_seen is {images_seen}; it must be a position, 0 or more")
    share = order.share(rank, world_size)
    chunks = dataset_chunks(data_set, order, images_seen)

    def begin(chunk: list[TaskRange]) -> Iterator[LabelledImages]:
        references = None  # to the iterators in the object store: they are too large for a broadcast
        if rank == 0:
            references = [ray.put(split(data_set, order, chunk, images_seen, world_size))]
        (reference,) = broadcast(references)
        iterators = ray.get(reference)
        return RankReader(
            iterators[rank],
            rank,
            start=chunk[0][0],
            stop=chunk[-1][1],
            stall_timeout_s=order.stall_timeout_s,
            storage_timeout_s=data_set.timeout_s,
        )

    first = [begin(chunk) for chunk in itertools.islice(chunks, 1)]  # reading begins here
    batches = itertools.chain.from_iterable(itertools.chain(first, map(begin, chunks)))
    return cut(batches, share, order.micro_batch_size)


def dataset_chunks(data_set: DataSet, order: ReadOrder, images_seen: int) -> Iterator[list[TaskRange]]:
    """The reading tasks from `images_seen` to the end of the order, about MAX_TASKS at a time.

    A chunk ends with a global batch: all ranks begin the next one in the same step, between two of its collectives.
    """
    stop = last_position(images_seen, order.total_images, order.batch_size)
    chunk = list[TaskRange]()
    for task in data_set.plan(order.seed, order.window_rows).tasks(images_seen, stop):
        chunk.append(task)
        _, end = task
        edge = end - (end - images_seen) % order.batch_size
        if len(chunk) >= MAX_TASKS and edge > chunk[0][0]:
            yield [(begin, min(end, edge)) for begin, end in chunk if begin < edge]
            chunk = [(max(begin, edge), end) for begin, end in chunk if end > edge]
    if chunk:
        yield chunk


def split(
    data_set: DataSet, order: ReadOrder, chunk: list[TaskRange], images_seen: int, world_size: int
) -> list[DataIterator]:
    """One iterator per rank over the reading tasks `chunk`.

    The calling process owns them: reading ends when it exits, or when all iterators are exhausted or dropped.
    """
    items = [{"start": start, "stop": stop} for start, stop in chunk]
    # One block per reading task: each runs as its own Ray task, as many at once as there are free CPUs.
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    context = rows.context  # a copy: other Datasets of this process keep their settings
    # Blocks of one row: the output buffer cuts a block as soon as it holds more than this.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    callback: Any = _SchedulingPause  # Ray needs the methods, not a base class
    context.custom_execution_callback_classes = [callback]
    options = context.execution_options
    options.preserve_order = True
    have = ray.cluster_resources()
    ahead = read_ahead_bytes(world_size, have.get("object_store_memory", 0.0))
    options.resource_limits = options.resource_limits.copy(object_store_memory=ahead)
    task: Any = _ReadTask(data_set, order, images_seen, world_size)
    cpus = ray_init.reading_cpus(have.get("CPU", 0.0))
    read = rows.map_batches(task, batch_size=1, batch_format="numpy", num_cpus=cpus)
    return read.streaming_split(world_size, equal=True)


def read_ahead_bytes(world_size: int, object_store: float) -> float:
    """Bytes that reading may be ahead of `world_size` workers, in an object store of that many bytes."""
    return min(world_size * BYTES_PER_WORKER, OBJECT_STORE_SHARE * object_store)


class _SchedulingPause:
    """Slows down Ray Data's scheduling loop where it would spin.

    While the loop holds back reading that is far enough ahead, finished blocks are pending, so the loop's own wait
    returns at once: it uses 0.94 of a core without this class, 0.07 with it (Ray 2.60, two cores).
    """

    def __init__(self) -> None:
        self._step_at = time.monotonic()

    def before_execution_starts(self, executor: Any) -> None: ...
    def after_execution_succeeds(self, executor: Any) -> None: ...
    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(max(0.0, self._step_at + LOOP_STEP_S - time.monotonic()))
        self._step_at = time.monotonic()


def step_back() -> None:
    """Raise this process's nice value to READING_PRIORITY. Ray's workers may have a larger one, 15 on most clusters,
    and only root may lower it."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(own, READING_PRIORITY))


class _ReadTask:
    """The function of a reading task, created by the process that calls `split`, run where Ray has a free CPU.

    Every task unpickles it, so data that grows with the data set is in the object store, unpickled once per process.
    """

    def __init__(self, data_set: DataSet, order: ReadOrder, images_seen: int, world_size: int) -> None:
        self._data_set = ray.put(data_set)
        self._order = order
        self._images_seen = images_seen
        self._world_size = world_size

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Yield one row per rank for each part, and also for an error: the splitter deals rows by number."""
        step_back()
        start = int(batch["start"][0])
        stop = int(batch["stop"][0])
        data_set, plan = _fetched(self._data_set, self._order.seed, self._order.window_rows)
        try:
            max_images = data_set.part_images(self._world_size)
            for images in data_set.parts(plan, start, stop, max_images):
                yield from self._rows(images, start)
                start += len(images.label)
        except tuple(_ERRORS.values()) as failure:
            error = json.dumps({"kind": type(failure).__name__, "message": str(failure)})
            yield from self._rows(data_set.empty(self._order.batch_size), start, error)

    def _rows(self, images: LabelledImages, start: int, error: str = "") -> Iterator[dict[str, np.ndarray]]:
        size = self._order.micro_batch_size
        begin = start - self._images_seen
        for rank in range(self._world_size):
            share = self._order.share(rank, self._world_size)
            yield {
                "image": rank_shard(images.image, begin, share, size)[None],
                "label": rank_shard(images.label, begin, share, size)[None],
                "rank": np.array([rank]),
                "start": np.array([start]),
                "stop": np.array([start + len(images.label)]),
                "error": np.array([error]),
            }


@lru_cache(maxsize=1)
def _fetched(reference: Any, seed: int, window_rows: int) -> tuple[DataSet, Plan]:
    """The data set of an object reference, and its plan."""
    data_set: DataSet = ray.get(reference)
    return data_set, data_set.plan(seed, window_rows)


class RankReader:
    """The images of one rank, in order, from its iterator of `split`; errors as in `micro_batches`.

    Rows are fetched one ahead in a thread, which ends with this object. Ray itself would wait for a free CPU without a
    message. Failing storage reports an error row after its own time-out; the stall time-out is added to that one.

    Args:
        start: position of the first image of the Dataset, for any rank.
        stop: position after its last image.
    """

    def __init__(
        self,
        iterator: DataIterator,
        rank: int,
        start: int,
        stop: int,
        *,
        stall_timeout_s: float,
        storage_timeout_s: float,
    ) -> None:
        self._rank = rank
        self._position = start
        self._stop = stop
        self._stall_timeout_s = stall_timeout_s
        self._storage_timeout_s = storage_timeout_s
        self._rows: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        thread = threading.Thread(
            target=_fetch, args=(iterator, self._rows, self._closed), name="ddpm-data", daemon=True
        )
        thread.start()

    def __iter__(self) -> "RankReader":
        return self

    def __next__(self) -> LabelledImages:
        timeout_s = self._stall_timeout_s + self._storage_timeout_s
        try:
            row = self._rows.get(timeout=timeout_s)
        except queue.Empty:
            raise UserError(
                f"no data for {timeout_s:g} s (stall_timeout_s {self._stall_timeout_s:g} + storage_timeout_s "
                f"{self._storage_timeout_s:g}), and no error from storage: perhaps no CPU is free for the "
                "tasks that read; lower --cluster.cpus-per-worker or add CPUs to the cluster"
            ) from None
        if isinstance(row, StopIteration) and self._position != self._stop:
            raise WrongOrder(
                f"Ray Data ended before the images of rank {self._rank} from position {self._position:,} on; they end "
                f"at position {self._stop:,}"
            )
        if isinstance(row, BaseException):
            raise row
        if row["error"][0]:
            error = json.loads(row["error"][0])
            raise _ERRORS[error["kind"]](error["message"])
        rank = int(row["rank"][0])
        start = int(row["start"][0])
        if (rank, start) != (self._rank, self._position):
            raise WrongOrder(
                f"Ray Data delivered the images of rank {rank} from position {start:,} on; the next ones are those of "
                f"rank {self._rank} from position {self._position:,} on"
            )
        self._position = int(row["stop"][0])
        return LabelledImages(row["image"][0], row["label"][0])

    def __del__(self) -> None:
        self._closed.set()
        with suppress(queue.Empty):  # make room for a thread that is blocked in `put`
            self._rows.get_nowait()


def _fetch(iterator: DataIterator, rows: queue.Queue[Any], closed: threading.Event) -> None:
    try:
        # Ray's own prefetching would hold back the first row until it has the second.
        for row in iterator.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0):
            rows.put(row)
            if closed.is_set():
                return
        rows.put(StopIteration())
    except BaseException as error:  # any error is passed to the consumer
        rows.put(error)
