"""The state of a run that driver, controller and workers share: a small actor, `RunState`.

It lives on the driver's node and needs no CPU. The last value of each subject is kept.

The actor may die as well. Ray restarts it, empty, and repeats the calls that were not answered. The driver, which
reads it twice a second, detects that and restores its values (`RunStateClient`). Values set after the last reading
are lost, so nothing depends on them: workers report their end again to a new actor, and checkpoints and user errors
are found without it.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# Subjects.
FAILURE = "failure"
"""A UserError that a restart does not fix."""
STOP = "stop"
"""Reason for the workers to stop after the current step, with a checkpoint."""
PREEMPTION = "preemption"
"""A value of STOP: a node of the workers is about to be taken away."""
MORE_WORKERS = "more workers"
"""A value of STOP: nodes have joined, and the next worker group can be larger."""
ENDS_GROUP = (PREEMPTION, MORE_WORKERS)
"""Values of STOP that end this worker group only; the next group continues the run."""
ENDED = "ended"
"""images_seen at which the workers last left the loop."""
COMMITTED = "committed"
"""images_seen of the newest stored checkpoint."""
PROGRESS = "progress"
"""A progress.Progress."""
METRICS = "metrics"
"""The newest NUM_POINTS points of each curve, as {name: [(images_seen, value), ...]}."""
NUM_POINTS = 8
PLACE = "place"
"""The placement group that the workers were last started in."""
WORKERS = "workers"
"""The number of workers that train."""
FAILURES, PREEMPTIONS = "failures", "preemptions"
"""Counters of `failed` and `preempted`."""
NUMBER = "number"
"""RunSpec.number; missing in a restarted actor."""
WARNINGS = "warnings"
"""Warnings that the driver shows, a line each."""


@dataclass(frozen=True)
class RunSpec:
    """A run as its workers receive it."""

    number: int
    """Number of the run, from 1, for workers that stay from one run to the next."""
    what: Any
    """A Ray reference to the workers' arguments; the actor, a small process, does not fetch them."""


class RunState:
    """The actor that holds the state of a run."""

    def __init__(self) -> None:
        self._spec: RunSpec | None = None
        self._closed = False
        self._values: dict[str, Any] = {WARNINGS: []}
        self._life, self._ended = uuid.uuid4().hex, (0, -1)

    def submit(self, spec: RunSpec) -> None:
        """Submit a run to the workers; values of the previous run are dropped, except PLACE."""
        self._spec = spec
        self._values = {NUMBER: spec.number, WARNINGS: [], PLACE: self._values.get(PLACE)}

    def restore(self, spec: RunSpec | None, values: dict[str, Any]) -> dict[str, Any]:
        """Restore the values of an actor that died, except those set again since; returns all values."""
        if self._spec is None:
            self._spec = spec
            warnings = values.get(WARNINGS, []) + self._values[WARNINGS]
            self._values = {**values, **self._values, WARNINGS: warnings}
            self.ended(*self._ended)
        return self._values

    def close(self) -> None:
        """Tell the workers that no other run follows."""
        self._closed = True

    def next_run(self, after: int) -> tuple[RunSpec | Literal["wait", "leave"], str]:
        """The run for workers that have finished run `after`, and an id that changes if the actor restarts."""
        if self._closed:
            return "leave", self._life
        if self._spec is None or self._spec.number <= after or self._values.get(ENDED) is not None:
            return "wait", self._life
        return self._spec, self._life

    def ended(self, number: int, images_seen: int) -> str:
        """Record that the workers have left the loop of run `number`; returns the id, as `next_run` does."""
        self._ended = number, images_seen  # for `restore`, if this actor does not know the run yet
        if self._spec is not None and number == self._spec.number:
            self._values[ENDED] = images_seen
        return self._life

    def set(self, subject: str, value: Any) -> None:
        """Set the value of `subject`; None: there is none."""
        self._values[subject] = value

    def measured(self, values: Mapping[str, float], images_seen: int) -> None:
        """Add points to curves; the newest NUM_POINTS of each are kept, for a driver that polls late."""
        curves = self._values.setdefault(METRICS, {})
        for name, value in values.items():
            curves[name] = [*curves.get(name, [])[1 - NUM_POINTS :], (images_seen, value)]

    def warn(self, line: str) -> None:
        """Add a warning for the driver to show."""
        self._values[WARNINGS].append(line)

    def snapshot(self) -> dict[str, Any]:
        """All values by subject."""
        return self._values

    def failed(self) -> int:
        """Count a failure; returns the number in a row without a new checkpoint."""
        committed = self._values.get(COMMITTED, -1)
        failures, failed_at = self._values.get(FAILURES, (0, -1))
        failures = 1 if committed > failed_at else failures + 1
        self._values[FAILURES] = failures, committed
        return failures

    def preempted(self) -> int:
        """Count a preemption; returns the total."""
        self._values[PREEMPTIONS] = self._values.get(PREEMPTIONS, 0) + 1
        return self._values[PREEMPTIONS]


class RunStateClient:
    """The driver's side of a RunState: the values it sets survive the actor's death.

    Attributes:
        actor: the RunState, for controller and workers.
    """

    def __init__(self) -> None:
        self.actor = start()
        self._spec: RunSpec | None = None
        self._values: dict[str, Any] = {}

    def submit(self, spec: RunSpec) -> None:
        """`RunState.submit`, without waiting for an actor that is still starting."""
        self._spec = spec
        self._values = {NUMBER: spec.number, PLACE: self._values.get(PLACE)}
        self.actor.submit.remote(spec)

    def set(self, subject: str, value: Any) -> None:
        """`RunState.set`."""
        ray.get(self.actor.set.remote(subject, value))
        self._values[subject] = value

    def snapshot(self) -> dict[str, Any]:
        """All values by subject; a restarted actor gets the last known ones first."""
        values = ray.get(self.actor.snapshot.remote())
        if NUMBER not in values:
            values = ray.get(self.actor.restore.remote(self._spec, self._values))
        self._values = values
        return dict(values)

    def failed(self) -> int:
        """`RunState.failed`."""
        self.snapshot()
        return ray.get(self.actor.failed.remote())

    def preempted(self) -> int:
        """`RunState.preempted`."""
        self.snapshot()
        return ray.get(self.actor.preempted.remote())


def start() -> Any:
    """Create a RunState on this node; it lives as long as this process, and is restarted if it dies."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(num_cpus=0)(RunState).options(**options).remote()
