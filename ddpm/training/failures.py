"""Limits on a run's failures: `FailureBudget`, a callback in Ray Train's controller, and the errors it raises."""

from typing import Any

import ray
import ray.exceptions
from ray.train import UserCallback

from ddpm.config import Config
from ddpm.training import run_state
from ddpm.utils.errors import UserError

SHOWN = 300
"""Characters of a worker's error in a warning."""


class TrainingFailed(UserError):
    """Workers failed more often than cluster.max_failures allows."""

    exit_code = 1


class FailureBudget(UserCallback):
    """Ends a run that fails too often, by raising from the callback.

    FailureConfig.max_failures counts all failures of a run. This budget counts failures in a row without a new
    checkpoint, so that a week on a flaky cluster does not end the run. Preemptions are counted here too: a group that
    leaves in good order before its node is taken away is not a failure for Ray.
    """

    def __init__(self, config: Config, state: Any) -> None:  # `state`: the run's RunState actor
        self._config, self._state = config, state

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        values = ray.get(self._state.snapshot.remote())
        if values.get(run_state.FAILURE) is not None:
            raise RuntimeError("a user's mistake, which a restart does not fix")
        if values.get(run_state.STOP) in run_state.ENDS_GROUP:
            ray.get(self._state.set.remote(run_state.STOP, None))
        limits = self._config.cluster
        deaths = {rank: death for rank, error in worker_exceptions.items() if (death := _death(error))}
        # A death causes the other workers' errors: their collectives break off.
        rank, cause = next(iter(deaths.items() or worker_exceptions.items()))
        failure: TrainingFailed
        if any(death.preempted for death in deaths.values()):
            count, most = ray.get(self._state.preempted.remote()), limits.max_preemptions
            failure = too_many_preemptions(self._config)
        else:
            count, most = ray.get(self._state.failed.remote()), limits.max_failures
            failure = TrainingFailed(
                f"training failed: {last_line(cause)} ({count} times since the last checkpoint, "
                "--cluster.max-failures; --verbose shows tracebacks)"
            )
        if count <= most:
            line = f"worker {rank} failed; resuming from the last checkpoint: {last_line(cause)[:SHOWN]}"
            self._state.warn.remote(line)
            return
        ray.get(self._state.set.remote(run_state.FAILURE, failure))
        raise failure


def _death(error: Exception) -> ray.exceptions.RayActorError | None:
    """The death of a worker's process; None: the worker raised an error."""
    # Ray Train wraps the death (2.60); without this attribute a death counts as any other failure.
    error = getattr(error, "health_check_failure", error)
    return error if isinstance(error, ray.exceptions.RayActorError) else None


def too_many_preemptions(config: Config) -> TrainingFailed:
    return TrainingFailed(
        f"nodes were preempted more than {config.cluster.max_preemptions} times (--cluster.max-preemptions); "
        "run the same command again to resume from the last checkpoint"
    )


def last_line(error: BaseException) -> str:
    """The last line of a failure's message, or of its first failed worker's."""
    failures = getattr(error, "worker_failures", None) or {}
    cause: BaseException = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else repr(cause)
