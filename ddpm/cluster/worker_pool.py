"""A pool of workers for independent pieces of work: sampling and evaluation. A worker holds an object, such as a net.

A worker has one GPU, or else one core. CPU kernels may round differently with another number of threads; with one
thread per piece, every worker computes the same result, bit for bit. Several cores compute several pieces at once,
which is as fast as all cores on one piece, and twice as fast beside a busy process (benchmarks/sampling.md).

If a worker dies, another one repeats its piece. Workers without free resources in the cluster stay pending while the
others work, so a pool shrinks and grows with its cluster.
"""

import ctypes
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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

MAX_DEATHS = 3
"""Worker deaths after which the pool gives up: in a row before they started, or on the same piece."""
NO_WORKER_S = 15.0
"""Seconds without any worker after which the pool logs a warning."""


class WorkersDied(UserError):
    """Workers died repeatedly, or their cluster died."""

    exit_code = 1


class WorkerPool(Generic[Held]):
    """A context with workers: threads of this process, or actors of a Ray cluster.

    Without a cluster in the environment (RAY_ADDRESS), the workers are this machine's GPU or all its cores, and Ray
    is not started, unless several workers are requested or there are several GPUs.

    Args:
        make: `make(device)` returns what a worker holds; threads of one process share it. `make` is sent to every
            worker once, with its weights: a `functools.partial` of an importable function or class.
        num_workers: actors, with a GPU each if the cluster has any, else with a core each. 1, without a cluster: one
            piece at a time. None: all GPUs, or all cores.
    """

    def __init__(self, make: Callable[[torch.device], Held], num_workers: int | None = None) -> None:
        joined = "RAY_ADDRESS" in os.environ  # then this machine's GPUs do not matter
        self.has_gpus: bool = _resources().get("GPU", 0) >= 1 if joined else devices.count() > 0
        """Whether the workers have GPUs."""
        if joined or (num_workers or devices.count()) > 1:
            self._workers: _Actors | _Threads = _Actors(make, num_workers, self.has_gpus)
        else:
            self._workers = _Threads(make, num_workers, self.has_gpus)

    def map(
        self, work: Callable[[Held, Piece], Result], pieces: Iterable[Piece]
    ) -> Iterator[tuple[Piece, Result]]:
        """Yield (piece, work(held, piece)) for every piece, in order of completion.

        Every worker has one piece, and gets the next one before a result is yielded. If a worker dies, its piece
        is repeated; a result is yielded once.

        Args:
            work: a method of the held object, or an importable function; threads may run it concurrently.
            pieces: small and hashable; consumed as needed.

        Raises:
            UserError: what `make` or `work` raised.
            WorkersDied: MAX_DEATHS workers died on one piece, or in a row before they started.
        """
        return self._workers.map(work, iter(pieces))

    def __enter__(self) -> "WorkerPool[Held]":
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.close()


class _Threads:
    """Workers in this process: a thread for its GPU, or one per core."""

    def __init__(self, make: Callable[[torch.device], Any], num_workers: int | None, has_gpus: bool) -> None:
        self._make, self._device = make, devices.default() if has_gpus else devices.CPU
        self._num_workers = num_workers or (1 if has_gpus else len(os.sched_getaffinity(0)))
        self._held: Any = None
        self._busy: set[int] = set()

    def map(self, work: Callable[[Any, Any], Any], pieces: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        if self._held is None:
            self._held = self._make(self._device)

        def do(piece: Any) -> Any:
            self._busy.add(threading.get_ident())
            try:
                return work(self._held, piece)
            finally:
                self._busy.discard(threading.get_ident())

        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for every thread that computes, also for later ones
        pool = ThreadPoolExecutor(self._num_workers, initializer=torch.set_num_threads, initargs=(1,))
        jobs: dict[Future[Any], Any] = {}

        def submit() -> None:
            for piece in islice(pieces, self._num_workers - len(jobs)):
                jobs[pool.submit(do, piece)] = piece

        try:
            submit()
            while jobs:
                done = wait(jobs, return_when=FIRST_COMPLETED).done.pop()
                piece = jobs.pop(done)
                submit()
                yield piece, done.result()
        finally:
            # After an error or Ctrl-C, do not wait for running pieces, which may take minutes.
            for thread in tuple(self._busy):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(SystemExit)
                )
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)

    def close(self) -> None:
        self._held = None


class _Actors:
    """Workers in a Ray cluster: actors with a GPU or a core each.

    Ray could restart an actor and repeat its piece, but a restarted actor without free resources would hold its
    piece forever. This class gives a piece only to a worker that runs.
    """

    def __init__(self, make: Callable[[torch.device], Any], num_workers: int | None, has_gpus: bool) -> None:
        import ray

        have = _resources()
        self._num_workers = num_workers or max(1, int(have.get("GPU" if has_gpus else "CPU", 1)))
        self._kind = "GPU" if has_gpus else "CPU"
        share: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1} if has_gpus else {"num_cpus": 1}
        self._new_worker: Any = ray.remote(max_restarts=0, **share)(_Worker).remote
        self._make = ray.put(make)
        self._idle: list[Any] = []
        self._joining: dict[Any, Any] = {}
        self._jobs: dict[Any, tuple[Any, Any]] = {}
        self._todo = deque[Any]()
        self._deaths = Counter[Any]()

    def map(self, work: Callable[[Any, Any], Any], pieces: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        import ray

        self._todo.extend(islice(pieces, self._num_workers))
        try:
            while self._todo or self._jobs:
                self._start_workers(min(self._num_workers, len(self._todo) + len(self._jobs)))
                self._submit(work)
                ready, _ = ray.wait([*self._jobs, *self._joining], timeout=NO_WORKER_S)
                if not ready and not self._jobs:
                    log.warning("no worker has found a free %s in the Ray cluster yet; waiting", self._kind)
                if ready and (finished := self._receive(ready[0])):
                    self._todo.extend(islice(pieces, 1))
                    self._submit(work)
                    yield finished
        finally:
            for worker, _ in self._jobs.values():  # after an error, do not wait for running pieces
                ray.kill(worker)
            self._jobs.clear()
            self._todo.clear()
            self._deaths.clear()

    def _start_workers(self, num_workers: int) -> None:
        for _ in range(num_workers - len(self._idle) - len(self._joining) - len(self._jobs)):
            worker = self._new_worker(self._make, self._kind == "GPU")
            self._joining[worker.is_ready.remote()] = worker

    def _submit(self, work: Callable[[Any, Any], Any]) -> None:
        while self._idle and self._todo:
            worker, piece = self._idle.pop(), self._todo.popleft()
            self._jobs[worker.do.remote(work, piece)] = worker, piece

    def _receive(self, job: Any) -> tuple[Any, Any] | None:
        """A piece and its result; None: a worker has started or died."""
        import ray
        import ray.exceptions

        is_new = job in self._joining
        worker, piece = (self._joining.pop(job), None) if is_new else self._jobs.pop(job)
        try:
            result = ray.get(job)
        except ray.exceptions.RayTaskError as error:
            self._idle.append(worker)
            if isinstance(error.cause, UserError):  # without the worker's traceback
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:  # all other errors: the worker is dead
            ray.kill(worker)
            self._deaths[piece] += 1
            if self._deaths[piece] == MAX_DEATHS:
                over = "one after another before they started" if is_new else f"on the same piece, {piece}"
                raise WorkersDied(
                    f"{MAX_DEATHS} workers died {over}; the last error: {error_line(error)}"
                ) from None
            if not is_new:
                self._todo.appendleft(piece)
            return None
        self._idle.append(worker)
        if is_new:
            self._deaths[None] = 0
            return None
        return piece, result

    def close(self) -> None:
        import ray

        for worker in (*self._idle, *self._joining.values()):
            ray.kill(worker)
        self._idle.clear()
        self._joining.clear()


class _Worker:
    """The actor."""

    def __init__(self, make: Callable[[torch.device], Any], has_gpu: bool) -> None:
        torch.set_num_threads(1)
        self._make, self._device = make, devices.default() if has_gpu else devices.CPU
        self._held: Any = None

    def is_ready(self) -> bool:
        """Return True; a call returns once the actor runs."""
        return True

    def do(self, work: Callable[[Any, Any], Any], piece: Any) -> Any:
        if self._held is None:  # not in __init__, where Ray would turn an error into text
            self._held = self._make(self._device)
        return work(self._held, piece)


def _resources() -> dict[str, float]:
    """Resources that the cluster (joined, or started here) has or may grow to."""
    from ddpm.cluster import ray_init

    ray_init.connect()
    return ray_init.resources()
