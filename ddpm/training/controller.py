"""What runs in Ray Train's controller, besides Ray Train: when a run is given up, how it grows, how workers meet.

Its own room because these live in a process of their own, between the driver and the workers; they speak with
both through the board. Every start waits for that process, and PyTorch would take it as long again as all the rest:
this module and what it imports do without.
"""

import logging
import time
from datetime import timedelta
from typing import Any

import ray
import ray.exceptions
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.callback import UserCallback

from ddpm.config import Config, UserError
from ddpm.training import board as boards

SHOWN = 300
"""Characters of a worker's error in a warning."""
LEAVE_TIMEOUT_S = 60.0
"""How long a run that grows waits for the checkpoint it grows from."""
COLLECTIVE_TIMEOUT_S = 1800.0
"""How long a worker waits for the others in a collective."""
PART_TIMEOUT_S = 30.0
"""How long workers may take to part."""

log = logging.getLogger(__name__)


class TrainingFailed(UserError):
    """Workers failed more often than cluster.max_failures allows."""

    exit_code = 1


class FailureBudget(UserCallback):
    """Ends a run that fails again and again; lives in Ray Train's controller, whose run ends when it raises."""

    def __init__(self, config: Config, board: Any) -> None:
        self._config, self._board = config, board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        notes = ray.get(self._board.read.remote())
        if notes.get(boards.FAILURE) is not None:
            raise RuntimeError("a mistake that no restart mends")
        if notes.get(boards.STOP) == boards.PREEMPTION:  # was not for those who come now
            ray.get(self._board.note.remote(boards.STOP, None))
        limits = self._config.cluster
        # A death explains the others' errors: collectives that broke off.
        rank, cause = max(worker_exceptions.items(), key=lambda item: _is_death(item[1]))
        failure: TrainingFailed
        if any(_is_preempted(error) for error in worker_exceptions.values()):
            count, most = ray.get(self._board.preempted.remote()), limits.max_preemptions
            failure = too_many_preemptions(self._config)
        else:
            count, most = ray.get(self._board.failed.remote()), limits.max_failures
            failure = TrainingFailed(
                f"training failed: {last_line(cause)} ({count} times since the last checkpoint, "
                "--cluster.max-failures; --verbose shows the whole story)"
            )
        if count <= most:
            line = f"worker {rank} failed; going on from the last checkpoint: {last_line(cause)[:SHOWN]}"
            self._board.warn.remote(line)
            return
        ray.get(self._board.note.remote(boards.FAILURE, failure))
        raise failure


class ResizeWithoutLoss(ControllerCallback):
    """Before Ray Train ends a healthy group to start a larger one, the group leaves a checkpoint of where it is.

    Ray Train has no public hook for it (2.60): it would go back to the checkpoint before.
    """

    def __init__(self, board: Any) -> None:
        self._board, self._healthy = board, False

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._healthy = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        if self._healthy:
            ray.get(self._board.note.remote(boards.STOP, "more workers"))
            deadline = time.monotonic() + LEAVE_TIMEOUT_S
            while ray.get(self._board.read.remote()).get(boards.ENDED) is None:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            ray.get(self._board.note.remote(boards.STOP, None))
            ray.get(self._board.note.remote(boards.ENDED, None))
        self._healthy = True


class ProcessGroup(BackendConfig):
    """Workers meet in a process group of torch.distributed; a single one has nobody to meet.

    What ray.train.torch's does, without PyTorch in the controller.

    Args:
        backend: "gloo" or "nccl".
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    @property
    def backend_cls(self) -> type[Backend]:
        return _Meeting


class _Meeting(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        size = len(worker_group)
        if size > 1:
            host, port = worker_group.execute_single(0, get_address_and_port)
            where = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
            meet = worker_group.execute_single_async
            ray.get([meet(rank, _meet, backend_config.backend, where, rank, size) for rank in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) > 1:
            try:
                ray.get(worker_group.execute_async(_part), timeout=PART_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                log.warning("workers did not part within %g s", PART_TIMEOUT_S)


def _meet(backend: str, where: str, rank: int, world_size: int) -> None:
    """Run by each worker."""
    import torch.distributed

    torch.distributed.init_process_group(
        backend,
        init_method=where,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )


def _part() -> None:
    """Run by each worker."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_death(error: Exception) -> bool:
    return isinstance(error, WorkerHealthCheckFailedError | ray.exceptions.RayActorError)


def _is_preempted(error: Exception) -> bool:
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    return isinstance(error, ray.exceptions.RayActorError) and error.preempted


def too_many_preemptions(config: Config) -> TrainingFailed:
    return TrainingFailed(
        f"nodes were taken away more than {config.cluster.max_preemptions} times (--cluster.max-preemptions); "
        "the same command goes on from the last checkpoint"
    )


def last_line(error: BaseException) -> str:
    """The line of a failure that says what went wrong."""
    failures = getattr(error, "worker_failures", None) or {}
    cause: BaseException = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else repr(cause)
