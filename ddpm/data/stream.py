"""The plan as a Ray Dataset: images stream from shards to the workers in the plan's exact order.

One input row is one reading task, a range of whole global batches. The task reads and decodes the range, and
emits one row for each worker: that worker's micro-batches in a single tensor. A row is a block, blocks keep
their order, and Ray's splitter deals them round-robin, so row k goes to worker k mod n. Nothing is shuffled,
re-blocked or copied on the way.

An error is a row as well: raised inside Ray, it would come out wrapped, logged and retried. The row says what is
wrong, and the worker that takes it raises.

The cursor is where the workers' restored checkpoint stands: rank 0 asks the run's `Librarian` to `split`, and hands
the iterators to the others.

This module and what it imports do without torch, which would double the time that processes that read take to start.
"""

import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import DataContext, DataIterator
from ray.data._internal import stats as ray_stats
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.iterator import stream_split_iterator
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddpm import connection, storage
from ddpm.config import Config, UserError
from ddpm.data.corrupt import CorruptData, Substitution, substitutions_from_json, substitutions_to_json
from ddpm.data.plan import CHUNK_IMAGES, chunks, share
from ddpm.data.reading import DataSet, Images, check_fits
from ddpm.data.shards import read_manifest
from ddpm.patience import StorageError

MAX_TASKS = 1000
"""Reading tasks of one Ray Dataset; training that needs more goes on with the next Dataset."""
OBJECT_STORE_BYTES = 256 << 20
"""How far reading may run ahead of training, in memory of the object store."""
REST_S = (0.005, 0.2)
"""A Ray Dataset that has nothing to do looks again after so long, and each time so much longer, up to the second."""
Share = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images [n, H, W, C] and labels [n]."""
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
    location = storage.resolve(uri)
    timeout_s = config.run.storage_timeout_s
    manifest = read_manifest(location.filesystem, location.path, uri, timeout_s)
    check_fits(manifest, config, uri)
    return DataSet(location.filesystem, location.path, manifest, config.data.split, timeout_s)


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
    """One iterator a worker over the reading tasks `todo`."""
    _spare_statistics()
    context = DataContext.get_current()
    # Blocks of one row: the output buffer cuts a block as soon as it holds more than this.
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [_Rest]
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=OBJECT_STORE_BYTES
    )
    task: Any = _ReadTask(config, data_set, todo, world_size)
    # One block a task: each is read by its own Ray task, and as many at once as there are free CPUs.
    rows = ray.data.from_items([{"id": i} for i in range(len(todo))], override_num_blocks=len(todo))
    return rows.map_batches(task, batch_size=1, batch_format="numpy").streaming_split(world_size, equal=True)


def shares(
    iterator: DataIterator,
    config: Config,
    on_substitutions: Callable[[list[Substitution]], object] | None = None,
) -> Iterator[Share]:
    """What one rank trains on of each reading task, micro-batch after micro-batch.

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
        for row in rows:
            if error := row["error"][0]:
                raise _ERRORS[json.loads(error)["kind"]](json.loads(error)["message"])
            if on_substitutions and (substitutions := substitutions_from_json(row["substitutions"][0])):
                on_substitutions(substitutions)
            yield row["image"][0], row["label"][0]

    return opened()


class Librarian:
    """The actor that directs the reading of a run, for one group of workers after the other.

    Ray Data starts a coordinator for every split, on the node of rank 0, and every restart of the workers would wait
    for that process to start. Here Ray's own coordinators live in one process that stays (Ray 2.60 knows no other).
    Each has its own number: what workers that are no more have left behind reaches none but theirs.
    """

    def __init__(self, verbose: bool) -> None:
        self._desks: dict[str, Any] = {}
        self._lock, self._coordinator = threading.Lock(), _plain(stream_split_iterator.SplitCoordinator)
        # Its `options` and `remote` are called in Ray's place.
        stream_split_iterator.SplitCoordinator = self  # type: ignore[misc, assignment]
        if not verbose:
            hide_progress()

    def split(
        self, config: Config, data_set: DataSet, todo: list[tuple[int, int]], world_size: int
    ) -> list[DataIterator]:
        """`split`; whatever was split before is given up."""
        with self._lock:
            for desk in self._desks.values():  # in a thread: it takes a moment until nothing is read any more
                threading.Thread(target=desk.shutdown_executor, daemon=True).start()
            for number in list(self._desks)[:-1]:  # the last one may be asked yet whether that was all
                self._desks.pop(number)._cur_epoch = None  # nobody waits there any more for others to come
            return split(config, data_set, todo, world_size)

    def call(self, number: str, method: str, *arguments: Any) -> Any:
        """A method of the coordinator of that number."""
        if (desk := self._desks.get(number)) is None:
            raise RuntimeError("the process that directed this reading has died")
        return getattr(desk, method)(*arguments)

    def options(self, **resources: Any) -> "Librarian":
        return self

    def remote(self, *arguments: Any) -> "_Desk":
        number = uuid.uuid4().hex
        self._desks[number] = self._coordinator(*arguments)
        return _Desk(ray.get_runtime_context().current_actor, number)


class _Desk:
    """Stands for the actor that Ray's iterators speak with."""

    def __init__(self, librarian: Any, number: str) -> None:
        for method in (
            "start_epoch",
            "get",
            "notify_split_finished",
            "stats",
            "get_dataset_tag",
            "get_dataset_context",
        ):
            setattr(self, method, _Method(librarian, number, method))


class _Method(NamedTuple):
    librarian: Any
    number: str
    method: str

    def remote(self, *arguments: Any) -> Any:
        return self.librarian.call.remote(self.number, self.method, *arguments)


def announce() -> None:
    """Let Ray's coordinator of all that ask for nodes begin: Ray Train's controller would, and wait for it (2.60)."""
    get_or_create_autoscaling_coordinator()


def librarian(num_workers: int, verbose: bool = False) -> Any:
    """A new one, for at most so many workers, on this node: it lives as long as this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Each worker has a call or two under way, and those of groups that died may hang in theirs for a while.
    options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 16 + 8 * num_workers}
    return ray.remote(Librarian).options(scheduling_strategy=here, **options).remote(verbose)


class _Nobody:
    """Stands for an actor that nobody would listen to."""

    def __getattr__(self, method: str) -> "_Nobody":
        return self

    def remote(self, *arguments: Any) -> None: ...


def _spare_statistics() -> None:
    """Send no statistics of reading to the process that keeps them for Ray's dashboard, where there is none."""
    if connection.begun_here():
        ray_stats.get_or_create_stats_actor = _Nobody  # type: ignore[assignment]


def _plain(actor_class: Any) -> Any:
    """The class that was made an actor's."""
    return actor_class.__ray_metadata__.modified_class


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
    """What a reading task does; made once on rank 0, run wherever Ray has a free CPU."""

    def __init__(
        self, config: Config, data_set: DataSet, todo: list[tuple[int, int]], world_size: int
    ) -> None:
        self._data_set, self._todo, self._world_size = data_set, todo, world_size
        self._train, self._on_corrupt = config.train, config.data.on_corrupt
        self._plan = data_set.plan(config.train.seed, config.data.window_rows)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """One row a rank, whatever happens: the splitter deals them by their number."""
        error = ""
        try:
            images = self._data_set.read(self._plan, *self._todo[int(batch["id"][0])], self._on_corrupt)
        except tuple(_ERRORS.values()) as failure:
            error = json.dumps({"kind": type(failure).__name__, "message": str(failure)})
            images = self._no_images()
        sizes = (self._train.batch_size, self._train.micro_batch_size)
        for rank in range(self._world_size):
            yield {
                "image": share(images.image, rank, self._world_size, *sizes)[None],
                "label": share(images.label, rank, self._world_size, *sizes)[None],
                "substitutions": np.array([substitutions_to_json(images.substitutions if rank == 0 else ())]),
                "error": np.array([error]),
            }

    def _no_images(self) -> Images:
        manifest, n = self._data_set.manifest, self._train.batch_size
        shape = (n, manifest.height, manifest.width, manifest.channels)
        return Images(np.zeros(shape, np.uint8), np.zeros(n, np.int64))


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
