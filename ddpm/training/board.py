"""What driver, controller and workers let each other know: a small actor, the board.

Its own room because all three sides of training speak through it, and each dies on its own. It lives on the
driver's node and needs no CPU. Only the last word on each subject stays.
"""

from dataclasses import dataclass
from typing import Any, Literal

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
"""images_seen at which the workers last left the loop."""
COMMITTED = "committed"
"""images_seen of the newest safe checkpoint."""
PROGRESS = "progress"
"""A progress.Progress."""
PLACE = "place"
"""The placement group that the workers were last started in."""
WARNINGS = "warnings"
"""Lines for the person watching."""


@dataclass(frozen=True)
class Play:
    """A run, as its workers are told of it."""

    number: int
    """Counts from 1, for workers that stay from one run to the next."""
    what: Any
    """A reference to what they need to know, which the board, a small process, does not look at."""


class Board:
    """The actor."""

    def __init__(self) -> None:
        self._play: Play | None = None
        self._over = False
        self._notes: dict[str, Any] = {WARNINGS: [], PLACE: None}
        self._failures, self._failed_at, self._preemptions = 0, -1, 0

    def begin(self, play: Play) -> None:
        """Tell the workers what is on; what was said of another run is wiped off, but not where they are."""
        self._play = play
        self._notes = {WARNINGS: [], PLACE: self._notes[PLACE]}
        self._failures, self._failed_at, self._preemptions = 0, -1, 0

    def leave(self) -> None:
        """Tell the workers that there is no more."""
        self._over = True

    def play(self, after: int) -> Play | Literal["wait", "leave"]:
        """What is on for workers that have done with play `after`."""
        if self._over:
            return "leave"
        has_ended = self._notes.get(ENDED) is not None
        return "wait" if self._play is None or self._play.number <= after or has_ended else self._play

    def ended(self, number: int, images_seen: int) -> None:
        """The workers have left the loop of play `number`."""
        if self._play is not None and number == self._play.number:
            self._notes[ENDED] = images_seen

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
