"""The restart policy of a run: what follows when its workers have left, or a process of it has died.

`decide` is a function of values alone. The driver asks it when Ray Train has ended (monitor.py), and Ray Train's
controller when workers have failed (`RestartPolicy`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.train import UserCallback

from ddpm.config.tree import ClusterConfig, Config
from ddpm.training import run_state
from ddpm.utils.errors import UserError

CONTROLLER = "Ray Train's controller"
STATE = "the run-state actor"
DEATHS = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""Errors of Ray that mean the death of a process."""
SHOWN = 300
"""Characters of a failure in a line."""
OUT_OF_MEMORY = re.compile(r"IP: ([^,)]+).*?was ([\d.]+ ?\w+)(?: used)? / ([\d.]+ ?\w+)", re.DOTALL)
"""Node, memory in use and its limit, in the message of Ray's memory monitor."""
KILLED = re.compile(r"Selected to kill: .*?task name=(\w+).*?memory used=([\d.]+ ?\w+)")
MAX_KILLED = 3
"""Number of killed processes in a line."""


class TrainingFailed(UserError):
    """Processes of a run failed more often than cluster.max_failures allows."""

    exit_code = 1


@dataclass(frozen=True)
class Restart:
    """New workers resume from the newest checkpoint."""

    line: str
    """A warning."""
    values: Mapping[str, Any]
    """New values of the run's state."""


@dataclass(frozen=True)
class Done:
    """The run has ended, or was stopped."""

    images_seen: int | None
    """None: it was stopped while no step was under way."""


@dataclass(frozen=True)
class Fail:
    """The run ends with an error."""

    error: UserError


def decide(
    died: Mapping[str, BaseException], values: Mapping[str, Any], config: Config, stop_requested: bool = False
) -> Restart | Done | Fail:
    """What follows for a run without workers.

    Failures are counted in a row without a new checkpoint, so that a week on a flaky cluster does not end the run.
    Preemptions are counted apart, and in total.

    Args:
        died: the error of each process that failed, by its name; empty: all workers exited normally.
        values: the run's state by subject, as in run_state.py.
        stop_requested: the run is to stop early.
    """
    ended = values.get(run_state.ENDED)
    if (error := values.get(run_state.FAILURE)) is not None:
        return Fail(error)
    if ended is not None and (ended >= config.train.total_images or stop_requested):
        return Done(ended)
    if stop_requested and is_idle(values):
        return Done(None)
    again: dict[str, Any] = {run_state.WORKERS: None, run_state.STEPPING: None}
    if values.get(run_state.STOP) in run_state.ENDS_GROUP:
        again |= {run_state.STOP: None, run_state.ENDED: None}
    if died:
        return _after_failures(died, values, again, config.cluster)
    assert ended is not None, "workers that exit normally set ENDED"
    if values.get(run_state.STOP) == run_state.MORE_WORKERS:
        return Restart(f"nodes have joined; continuing with more workers, at {ended:,} images", again)
    line = f"a node is about to be preempted; continuing on other nodes, at {ended:,} images"
    return _after_preemption(line, values, again, config.cluster)


def is_idle(values: Mapping[str, Any]) -> bool:
    """Whether no step is under way, so that a run that is to stop waits for nothing."""
    return values.get(run_state.STEPPING) is None


def _after_failures(
    died: Mapping[str, BaseException], values: Mapping[str, Any], again: dict[str, Any], limits: ClusterConfig
) -> Restart | Fail:
    deaths = dict[str, BaseException]()
    for process, error in died.items():
        death = _death(error)
        if death is not None:
            deaths[process] = death
    causes = deaths or died  # a death causes the other processes' errors: their collectives fail
    name = next(iter(causes))
    cause = causes[name]
    line = f"{name} failed; resuming from the last checkpoint: {last_line(cause)}"
    if any(getattr(death, "preempted", False) for death in deaths.values()):
        return _after_preemption(line, values, again, limits)
    committed = values.get(run_state.COMMITTED, -1)
    failures, failed_at = values.get(run_state.FAILURES, (0, -1))
    failures = 1 if committed > failed_at else failures + 1
    if name == CONTROLLER and not deaths:  # Ray Train has given up
        return Fail(TrainingFailed(f"training failed: {last_line(cause)} (--verbose shows tracebacks)"))
    if failures > limits.max_failures:
        times = f"{failures} times since the last checkpoint, --cluster.max-failures"
        return Fail(
            TrainingFailed(f"training failed: {last_line(cause)} ({times}; --verbose shows tracebacks)")
        )
    return Restart(line, {**again, run_state.FAILURES: (failures, committed)})


def _after_preemption(
    line: str, values: Mapping[str, Any], again: dict[str, Any], limits: ClusterConfig
) -> Restart | Fail:
    preemptions = values.get(run_state.PREEMPTIONS, 0) + 1
    if preemptions <= limits.max_preemptions:
        return Restart(line, {**again, run_state.PREEMPTIONS: preemptions})
    return Fail(
        TrainingFailed(
            f"nodes were preempted more than {limits.max_preemptions} times (--cluster.max-preemptions); "
            "run the same command again to resume from the last checkpoint"
        )
    )


class RestartPolicy(UserCallback):
    """Counts failures in Ray Train's controller, and ends a run that fails too often by raising from the callback."""

    def __init__(self, config: Config, state: Any) -> None:  # `state`: the run's RunState actor
        self._config = config
        self._state = state

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        died = {f"worker {rank}": error for rank, error in worker_exceptions.items()}
        decision = decide(died, ray.get(self._state.snapshot.remote()), self._config)
        if isinstance(decision, Fail):
            ray.get(self._state.set.remote(run_state.FAILURE, decision.error))
            raise decision.error
        if isinstance(decision, Restart):
            for subject, value in decision.values.items():
                ray.get(self._state.set.remote(subject, value))
            self._state.set.remote(run_state.WARNINGS, decision.line)


def _death(error: BaseException) -> BaseException | None:
    """The death of a process; None: the process raised an error."""
    # Ray Train wraps the death of a worker, and of an actor that its controller asked (Ray 2.60); without these
    # attributes a death counts as any other failure.
    for attribute in ("controller_failure", "health_check_failure", "cause"):
        inner = getattr(error, attribute, None)
        if inner is not None:
            error = inner
    return error if isinstance(error, DEATHS) else None


def last_line(error: BaseException) -> str:
    """The last line of a failure's message, or of its first failed worker's; for a kill by Ray's memory monitor, what
    was killed, and what to lower."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    message = str(error)
    memory = OUT_OF_MEMORY.search(message)
    if memory is not None:
        node, used, limit = memory.groups()
        killed = [f"{name} ({size})" for name, size in KILLED.findall(message)[:MAX_KILLED]]
        return (
            f"out of memory: {used} of {limit} on {node} were in use, so Ray killed {', '.join(killed) or 'it'}; "
            "lower --train.forward-images, --data.window-rows or --cluster.num-workers"
        )
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return repr(error)
    return lines[-1].partition(" Some common causes ")[0][:SHOWN]
