"""A pool of workers for independent pieces of work, such as sampling and evaluation.

On one machine the workers are threads of this process. On a Ray cluster every piece is a Ray task: if its worker
process or its node dies, Ray repeats the piece.

A worker has one GPU, or else one core. CPU kernels may round differently with another number of threads; with one
thread per piece, every worker computes the same result, bit for bit. Several cores compute several pieces at once,
which is as fast as all cores on one piece, and twice as fast beside a busy process (benchmarks/sampling.md).
"""

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, Generic, TypeVar

import torch

from ddpm.utils import devices
from ddpm.utils.errors import UserError
from ddpm.utils.retry import error_line

log = logging.getLogger(__name__)

Held = TypeVar("Held")
Piece = TypeVar("Piece")
Result = TypeVar("Result")

MAX_RETRIES = 3
"""How often Ray repeats a piece whose worker process or node died."""
FIRST_RESULT_S = 15.0
"""Seconds without a first result after which the pool logs that the cluster has no free GPU or core."""
WAIT_S = 1.0
"""Time-out of a wait for threads: a signal that arrives just before Python waits is handled only afterwards."""

_this_thread = threading.local()
"""`cancelled` is the event of the pool that this thread works for."""


class WorkersDied(UserError):
    """The worker of a piece died, and so did the workers of its repetitions."""

    exit_code = 1


def check_cancelled() -> None:
    """Raise CancelledError if the result of this thread's piece is no longer wanted, after an error or Ctrl-C.

    Work that takes more than a few seconds calls this in each of its steps. Elsewhere it does nothing.
    """
    cancelled = getattr(_this_thread, "cancelled", None)
    if cancelled is not None and cancelled.is_set():
        raise CancelledError


class WorkerPool(Generic[Held]):
    """A context with workers: threads of this process, or tasks of a Ray cluster.

    Without a cluster in the environment (RAY_ADDRESS), the workers are this machine's GPU or all its cores, and Ray
    is not started, unless several workers are requested or there are several GPUs.

    Args:
        make: `make(device)` returns what a worker holds, such as a net. It is called once in every process; threads
            share the object. Ray stores `make`, with its weights, once: a `functools.partial` of an importable
            function or class.
        num_workers: pieces at a time, with a GPU each if the cluster has any, else with a core each. 1, without a
            cluster: one thread. None: all GPUs, or all cores.
    """

    def __init__(self, make: Callable[[torch.device], Held], num_workers: int | None = None) -> None:
        is_joined = "RAY_ADDRESS" in os.environ
        self.has_gpus: bool
        """Whether the workers have GPUs."""
        if is_joined:  # then this machine's GPUs do not matter
            self.has_gpus = _resources().get("GPU", 0) >= 1
        else:
            self.has_gpus = devices.count() > 0
        self._workers: _Threads | _RayTasks
        if is_joined or (num_workers or devices.count()) > 1:
            self._workers = _RayTasks(make, num_workers, self.has_gpus)
        else:
            self._workers = _Threads(make, num_workers, self.has_gpus)

    def map(
        self, work: Callable[[Held, Piece], Result], pieces: Iterable[Piece]
    ) -> Iterator[tuple[Piece, Result]]:
        """Yield (piece, work(held, piece)) for every piece, in order of completion.

        As many pieces as there are workers are in progress. A worker gets its next piece before a result is yielded.

        Args:
            work: a method of the held object, or an importable function; threads may run it concurrently.
            pieces: consumed as needed.

        Raises:
            UserError: what `make` or `work` raised.
            WorkersDied: the worker of a piece died, and so did the workers of its repetitions.
        """
        return self._workers.map(work, iter(pieces))

    def __enter__(self) -> "WorkerPool[Held]":
        return self

    def __exit__(self, *error: object) -> None:
        del self._workers  # and with it the held object


class _Threads:
    """Workers in this process: a thread for its GPU, or one per core."""

    def __init__(self, make: Callable[[torch.device], Any], num_workers: int | None, has_gpus: bool) -> None:
        self._make = make
        self._device = devices.default() if has_gpus else devices.CPU
        self._num_workers = num_workers or (1 if has_gpus else len(os.sched_getaffinity(0)))

    @functools.cached_property
    def _held(self) -> Any:
        return self._make(self._device)

    def map(self, work: Callable[[Any, Any], Any], pieces: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        held = self._held
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for every thread that computes, also for later ones
        cancelled = threading.Event()
        threads = ThreadPoolExecutor(self._num_workers, initializer=_begin_thread, initargs=(cancelled,))
        running: dict[Future[Any], Any] = {}
        try:
            for piece in islice(pieces, self._num_workers):
                running[threads.submit(work, held, piece)] = piece
            while running:
                done = wait(running, WAIT_S, return_when=FIRST_COMPLETED).done
                if not done:
                    continue
                finished = next(iter(done))
                finished_piece = running.pop(finished)
                for piece in islice(pieces, 1):
                    running[threads.submit(work, held, piece)] = piece
                yield finished_piece, finished.result()
        finally:
            cancelled.set()  # after an error or Ctrl-C, running pieces end at their next step
            threads.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)


def _begin_thread(cancelled: threading.Event) -> None:
    torch.set_num_threads(1)
    _this_thread.cancelled = cancelled


class _RayTasks:
    """Workers in a Ray cluster: a task per piece, with a GPU or a core."""

    def __init__(self, make: Callable[[torch.device], Any], num_workers: int | None, has_gpus: bool) -> None:
        import ray

        have = _resources()
        self._kind = "GPU" if has_gpus else "CPU"
        self._num_workers = num_workers or max(1, int(have.get(self._kind, 1)))
        options: dict[str, Any] = {"max_retries": MAX_RETRIES, "num_cpus": 1}
        if has_gpus:
            # By default Ray ends the process of a GPU task, and with it the net on its GPU, after one call.
            options |= {"num_cpus": 0, "num_gpus": 1, "max_calls": 0}
        self._task: Any = ray.remote(**options)(run_piece)
        # Ray loads a reference that is an argument, for every piece. It does not load one inside a list.
        self._make = [ray.put(make)]

    def map(self, work: Callable[[Any, Any], Any], pieces: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        import ray

        has_gpu = self._kind == "GPU"
        running: dict[Any, Any] = {}
        try:
            for piece in islice(pieces, self._num_workers):
                running[self._task.remote(self._make, has_gpu, work, piece)] = piece
            timeout_s: float | None = FIRST_RESULT_S
            while running:
                ready, _ = ray.wait(list(running), timeout=timeout_s)
                timeout_s = None  # one message is enough
                if not ready:
                    if ray.available_resources().get(self._kind, 0) < 1:
                        log.warning("no piece is done yet; every %s of the Ray cluster is in use", self._kind)
                    continue
                finished = ready[0]
                finished_piece = running.pop(finished)
                for piece in islice(pieces, 1):
                    running[self._task.remote(self._make, has_gpu, work, piece)] = piece
                yield finished_piece, _result(finished, finished_piece)
        finally:
            for task in running:  # after an error, do not wait for running pieces
                ray.cancel(task, force=True)


def _result(task: Any, piece: Any) -> Any:
    """The result of a finished Ray task."""
    import ray
    import ray.exceptions

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):  # without the worker's traceback
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        what = f"the worker of piece {piece} died {MAX_RETRIES + 1} times"
        raise WorkersDied(f"{what}; the last error: {error_line(error)}") from None


def run_piece(make: list[Any], has_gpu: bool, work: Callable[[Any, Any], Any], piece: Any) -> Any:
    """Run a piece: the Ray task. `make` has one element, the reference of what `WorkerPool` was given."""
    torch.set_num_threads(1)
    return work(_held(make[0], has_gpu), piece)


@functools.lru_cache(maxsize=1)
def _held(make: Any, has_gpu: bool) -> Any:
    """The object that this worker process holds for all its pieces of one pool."""
    import ray

    return ray.get(make)(devices.default() if has_gpu else devices.CPU)


def _resources() -> dict[str, float]:
    """Resources that the cluster (joined, or started here) has or may grow to."""
    from ddpm.cluster import ray_init

    ray_init.connect()
    return ray_init.resources()
