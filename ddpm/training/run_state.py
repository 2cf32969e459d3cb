"""The state of a run that driver, controller and workers share: a small actor, `RunState`.

It lives on the driver's node and needs no CPU. The last value of each subject is kept.

The actor may die as well. Ray restarts it, empty, and repeats the calls that were not answered. The driver, which
reads it twice a second, detects that and restores its values (run_state_client.py). Values set after the last reading
are lost, so nothing depends on them: new workers find what is left to do in storage.
"""

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
FAILURES = "failures"
"""Failures in a row without a new checkpoint, and COMMITTED at the last of them."""
PREEMPTIONS = "preemptions"
"""The number of preemptions."""
RUN = "run"
"""The run that the other values are of; missing in a restarted actor."""
WARNINGS = "warnings"
"""Warnings that the driver shows, a line each."""


class RunState:
    """The actor that holds the state of a run."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {WARNINGS: []}

    def restore(self, values: dict[str, Any]) -> dict[str, Any]:
        """Restore the values of an actor that died, except those set again since; returns all values."""
        if RUN not in self._values:
            warnings = values.get(WARNINGS, []) + self._values[WARNINGS]
            self._values = {**values, **self._values, WARNINGS: warnings}
        return self._values

    def set(self, subject: str, value: Any) -> None:
        """Set the value of `subject`; None: there is none.

        To WARNINGS, a line is added. To METRICS, (values by name, images_seen) are added as points; the newest
        NUM_POINTS of each curve are kept, for a driver that polls late.
        """
        if subject == WARNINGS:
            self._values[WARNINGS].append(value)
        elif subject == METRICS:
            curves, (values, images_seen) = self._values.setdefault(METRICS, {}), value
            for name, number in values.items():
                curves[name] = [*curves.get(name, [])[1 - NUM_POINTS :], (images_seen, number)]
        else:
            self._values[subject] = value

    def snapshot(self) -> dict[str, Any]:
        """All values by subject."""
        return self._values
