"""The plan as a Ray Dataset: images stream from shards to the workers in the plan's exact order.

One input row is one reading task, a range of whole windows. The task reads the row groups of a window once, decodes
part after part, and emits one row of each part for each worker: what that worker trains on of it, in a single tensor.
A row is a block, blocks keep their order, and Ray's splitter deals them round-robin, so row k goes to worker k mod n.
Nothing is shuffled, re-blocked or copied on the way. A micro-batch that a window's edge cuts is put together by its
worker.

An error is a row as well: raised inside Ray, it would come out wrapped, logged and retried. The row says what is
wrong, and the worker that takes it raises.

The cursor is where the workers' restored checkpoint stands: rank 0 asks the run's librarian to `split`, and hands
the iterators to the others.

This module and what it imports do without torch, which would double the time that processes that read take to start.
"""

import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import DataContext, DataIterator
from ray.data._internal import stats as ray_stats
from ray.data._internal.execution.execution_callback import ExecutionCallback

from ddpm.cluster import ray_init
from ddpm.config import Config
from ddpm.data.corrupt import CorruptData, Substitution, substitutions_from_json, substitutions_to_json
from ddpm.data.plan import Plan, last_position, share
from ddpm.data.reading import DataSet, Images, Share, check_fits, scale_of
from ddpm.data.shards import read_manifest
from ddpm.storage import locations
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError

MAX_TASKS = 1000
"""Reading tasks of one Ray Dataset; training that needs more goes on with the next Dataset."""
OBJECT_STORE_BYTES = 256 << 20
"""How far reading may run ahead of training, in memory of the object store."""
REST_S = (0.005, 0.2)
"""A Ray Dataset that has nothing to do looks again after so long, and each time so much longer, up to the second."""
Task = tuple[int, int]
"""Positions of the plan from start to stop."""
_ERRORS: dict[str, type[UserError]] = {kind.__name__: kind for kind in (CorruptData, StorageError)}
"""What reading may raise: these travel as rows."""


def open_data_set(config: Config) -> DataSet:
    """The split config.data.split of the data set at config.data.shards.

    Raises:
        UserError: there is no data set, it has no such split, or it does not fit the net.
        StorageError: storage has failed for longer than config.run.storage_timeout_s.
    """
    uri = config.data.shards
    if uri is None:
        raise UserError("data.shards is not given; expected the folder or URI of a data set")
    location = locations.resolve(uri)
    timeout_s = config.run.storage_timeout_s
    manifest = read_manifest(location.filesystem, location.path, uri, timeout_s)
    check_fits(manifest, config, uri)
    scale = scale_of(manifest, config.model.image_size)
    return DataSet(location.filesystem, location.path, manifest, config.data.split, timeout_s, scale)


def hide_progress() -> None:
    """Keep Ray Data's own bars off the terminal, for Datasets made in this process."""
    DataContext.get_current().enable_progress_bars = False


def legs(config: Config, data_set: DataSet, images_seen: int) -> Iterator[list[Task]]:
    """The reading tasks of the rest of training, in Datasets of at most MAX_TASKS."""
    train = config.train
    stop = last_position(images_seen, train.total_images, train.batch_size)
    tasks = data_set.plan(train.seed, config.data.window_rows).tasks(images_seen, stop)
    while leg := list(itertools.islice(tasks, MAX_TASKS)):
        yield leg


def split(
    config: Config, data_set: DataSet, todo: list[Task], images_seen: int, world_size: int
) -> list[DataIterator]:
    """One iterator a worker over the reading tasks `todo`.

    Args:
        images_seen: a position where a global batch begins.
    """
    _spare_statistics()
    context = DataContext.get_current()
    # Blocks of one row: the output buffer cuts a block as soon as it holds more than this.
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [_Rest]
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=OBJECT_STORE_BYTES
    )
    task: Any = _ReadTask(config, data_set, images_seen, world_size)
    # One block a task: each is read by its own Ray task, and as many at once as there are free CPUs.
    items = [{"start": start, "stop": stop} for start, stop in todo]
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    return rows.map_batches(task, batch_size=1, batch_format="numpy").streaming_split(world_size, equal=True)


def shares(
    iterator: DataIterator,
    config: Config,
    on_substitutions: Callable[[list[Substitution]], object] | None = None,
) -> Iterator[Share]:
    """What one rank trains on of each part that is read, in order.

    Reading begins with the call, not with the first `next`.

    Args:
        iterator: the rank's, of `split`.
        on_substitutions: rank 0's is told what stands in for unreadable images of all ranks, before the share of
            their range is yielded.

    Raises:
        CorruptData: an image cannot be read (data.on_corrupt "error"), or none of its whole window.
        StorageError: storage has failed for longer than run.storage_timeout_s.
        UserError: no data for data.stall_timeout_s longer than that.
    """
    _spare_statistics()
    rows = _with_timeout(iterator, config.data.stall_timeout_s, config.run.storage_timeout_s)

    def opened() -> Iterator[Share]:
        begun: list[Share] = []
        for row in rows:
            if error := row["error"][0]:
                raise _ERRORS[json.loads(error)["kind"]](json.loads(error)["message"])
            if on_substitutions and (substitutions := substitutions_from_json(row["substitutions"][0])):
                on_substitutions(substitutions)
            yield from begun  # of a global batch of which all is known by now, that of other ranks too
            image, label, whole = row["image"][0], row["label"][0], row["whole"][0]
            yield image[:whole], label[:whole]
            begun = [(image[whole:], label[whole:])]
        yield from begun

    return opened()


class _Nobody:
    """Stands for an actor that nobody would listen to."""

    def __getattr__(self, method: str) -> "_Nobody":
        return self

    def remote(self, *arguments: Any) -> None: ...


def _spare_statistics() -> None:
    """Send no statistics of reading to the process that keeps them for Ray's dashboard, where there is none."""
    if ray_init.begun_here():
        ray_stats.get_or_create_stats_actor = _Nobody  # type: ignore[assignment]


class _Rest(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest where it would spin.

    While it holds back reading that is far enough ahead, finished blocks wait for it, so that it never waits: it
    takes a whole core from training (Ray 2.60).
    """

    def __init__(self) -> None:
        self._progress, self._rest_s = 0, 0.0

    def on_execution_step(self, executor: Any) -> None:
        counts = [op.metrics for op in executor._topology]
        progress = sum(c.num_tasks_submitted + c.num_task_outputs_generated for c in counts)
        shortest_s, longest_s = REST_S
        self._rest_s = min(self._rest_s + shortest_s, longest_s) if progress == self._progress else 0.0
        self._progress = progress
        time.sleep(self._rest_s)


class _ReadTask:
    """What a reading task does; made by who splits, run wherever Ray has a free CPU.

    Every task unpacks it: what grows with the data set stays in the object store, and is unpacked once a process.
    """

    def __init__(self, config: Config, data_set: DataSet, images_seen: int, world_size: int) -> None:
        self._train, self._data = config.train, config.data
        self._data_set, self._images_seen, self._world_size = ray.put(data_set), images_seen, world_size

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """One row a rank of each part, whatever happens: the splitter deals them by their number."""
        start, stop = int(batch["start"][0]), int(batch["stop"][0])
        data_set, plan = _fetched(self._data_set, self._train.seed, self._data.window_rows)
        try:
            most = data_set.part_images(self._world_size)
            for images in data_set.parts(plan, start, stop, most, self._data.on_corrupt):
                yield from self._rows(images, start)
                start += len(images.label)
        except tuple(_ERRORS.values()) as failure:
            error = json.dumps({"kind": type(failure).__name__, "message": str(failure)})
            yield from self._rows(data_set.empty(self._train.batch_size), start, error)

    def _rows(self, images: Images, start: int, error: str = "") -> Iterator[dict[str, np.ndarray]]:
        begin, batch_size = start - self._images_seen, self._train.batch_size
        whole = max(0, (begin + len(images.label)) // batch_size * batch_size - begin)
        for rank in range(self._world_size):
            which = (begin, rank, self._world_size, self._train.micro_batch_size)
            yield {
                "image": share(images.image, *which)[None],
                "label": share(images.label, *which)[None],
                "whole": np.array([len(share(images.label[:whole], *which))]),
                "substitutions": np.array([substitutions_to_json(images.substitutions if rank == 0 else ())]),
                "error": np.array([error]),
            }


@lru_cache(maxsize=1)
def _fetched(reference: Any, seed: int, window_rows: int) -> tuple[DataSet, Plan]:
    """The data set that an object reference stands for, and its plan."""
    data_set: DataSet = ray.get(reference)
    return data_set, data_set.plan(seed, window_rows)


def _with_timeout(
    iterator: DataIterator, stall_timeout_s: float, storage_timeout_s: float
) -> Iterator[dict[str, Any]]:
    """The rows of `iterator`, fetched one ahead in a thread; Ray itself would wait for a free CPU without a word.

    Storage may fail for its own time-out, after which reading says so itself: only then does the stall's begin.
    """
    timeout_s = stall_timeout_s + storage_timeout_s
    rows: queue.Queue = queue.Queue(maxsize=1)
    end, closed = object(), threading.Event()

    def fetch() -> None:
        try:
            # Ray's own prefetching would hold back the first row until it has the second.
            for row in iterator.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0):
                rows.put(row)
                if closed.is_set():
                    return
            rows.put(end)
        except BaseException as error:  # handed to the consumer, whatever it is
            rows.put(error)

    def fetched() -> Iterator[dict[str, Any]]:
        try:
            while (row := rows.get(timeout=timeout_s)) is not end:
                if isinstance(row, BaseException):
                    raise row
                yield row
        except queue.Empty:
            raise UserError(
                f"no data for {timeout_s:g} s (data.stall_timeout_s {stall_timeout_s:g} + run.storage_timeout_s "
                f"{storage_timeout_s:g}), and no word from storage: no CPU may be free for the tasks that read; "
                "lower --cluster.cpus-per-worker or add CPUs to the cluster"
            ) from None
        finally:
            closed.set()
            with suppress(queue.Empty):  # make room, for a thread that waits to put its row
                rows.get_nowait()

    threading.Thread(target=fetch, name="ddpm-data", daemon=True).start()
    return fetched()
