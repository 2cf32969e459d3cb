"""What driver, controller and workers let each other know: a small actor, the board.

Its own room because all three sides of training speak through it, and each dies on its own. It lives on the
driver's node and needs no CPU. Only the last word on each subject stays.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# Subjects.
FAILURE = "failure"
"""A UserError that no restart mends."""
STOP = "stop"
"""Why the workers should end with the step they are in, and leave a checkpoint of it."""
PREEMPTION = "preemption"
"""Of STOP: a node of theirs is about to be taken away."""
ENDED = "ended"
"""images_seen at which the workers last returned."""
COMMITTED = "committed"
"""images_seen of the newest safe checkpoint."""
PROGRESS = "progress"
"""A progress.Progress."""
PLACE = "place"
"""The placement group that the workers were last started in."""
WARNINGS = "warnings"
"""Lines for the person watching."""


class Board:
    """The actor."""

    def __init__(self) -> None:
        self._notes: dict[str, Any] = {WARNINGS: []}
        self._failures, self._failed_at, self._preemptions = 0, -1, 0

    def note(self, subject: str, value: Any) -> None:
        """Write `value` over what was said of `subject`; None wipes it off."""
        self._notes[subject] = value

    def warn(self, line: str) -> None:
        """Add a line for the person watching."""
        self._notes[WARNINGS].append(line)

    def read(self) -> dict[str, Any]:
        """Everything on the board."""
        return self._notes

    def failed(self) -> int:
        """Count a failure; failures in a row, with no checkpoint in between."""
        committed = self._notes.get(COMMITTED, -1)
        self._failures = 1 if committed > self._failed_at else self._failures + 1
        self._failed_at = committed
        return self._failures

    def preempted(self) -> int:
        """Count a preemption; all there were."""
        self._preemptions += 1
        return self._preemptions


def put_up() -> Any:
    """A new board, on this node: it lives as long as this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
