"""The state of a run that driver, controller and workers share: a small actor, `RunState`.

It lives on the driver's node and needs no CPU. The last value of each subject is kept.

If the actor dies, the worker group fails: rank 0, which reads it twice a second, raises its error (worker.py). The
driver then starts another actor with the values that it read last, and new workers (monitor.py). What was set since is
lost, so nothing depends on it: new workers find what is left to do in storage.
"""

from collections.abc import Mapping
from typing import Any

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
PLACEMENT_GROUP = "placement group"
"""The placement group that the workers were last started in."""
WORKERS = "workers"
"""The number of workers that train; None while a group starts again."""
STEPPING = "stepping"
"""True once the workers may take steps (`RunState.begin`); None while a group starts."""
FAILURES = "failures"
"""Failures in a row without a new checkpoint, and COMMITTED at the last of them."""
PREEMPTIONS = "preemptions"
"""The number of preemptions."""
WARNINGS = "warnings"
"""Warnings that the driver shows, a line each."""


class RunState:
    """The actor that holds the state of a run."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values: dict[str, Any] = {WARNINGS: [], **values}

    def set(self, subject: str, value: Any) -> None:
        """Set the value of `subject`; None: there is none.

        To WARNINGS, a line is added. To METRICS, (values by name, images_seen) are added as points; the newest
        NUM_POINTS of each curve are kept, for a driver that polls late.
        """
        if subject == WARNINGS:
            self._values[WARNINGS].append(value)
        elif subject == METRICS:
            curves = self._values.setdefault(METRICS, {})
            values, images_seen = value
            for name, number in values.items():
                points = curves.get(name, [])[1 - NUM_POINTS :]
                curves[name] = [*points, (images_seen, number)]
        else:
            self._values[subject] = value

    def begin(self) -> bool:
        """Let the workers take steps, unless the run is to stop; returns whether they may.

        A driver that finds STOP set and STEPPING not set need not wait for the workers: they take no step.
        """
        if self._values.get(STOP) not in (None, *ENDS_GROUP):
            return False
        self._values[STEPPING] = True
        return True

    def snapshot(self) -> dict[str, Any]:
        """All values by subject."""
        return self._values
