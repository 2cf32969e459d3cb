"""What driver, controller and workers let each other know: a small actor, the board.

Its own room because all three sides of training speak through it, and each dies on its own. It lives on the
driver's node and needs no CPU. Only the last word on each subject stays.

The board may die as well. Ray starts it again, and repeats the calls that it did not answer; it then knows nothing. The
driver, which reads it twice a second, finds that out and tells it what was there (`RunStateClient`). What was noted
after the last reading is lost, so nothing depends on it: workers tell a new board that they have ended, and checkpoints
and mistakes are found again without one.
"""

import uuid
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
FAILURES, PREEMPTIONS = "failures", "preemptions"
"""What `failed` and `preempted` count."""
NUMBER = "number"
"""Play.number; missing on a board that was started anew."""
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
        self._notes: dict[str, Any] = {WARNINGS: []}
        self._life, self._ended = uuid.uuid4().hex, (0, -1)

    def begin(self, play: Play) -> None:
        """Tell the workers what is on; what was said of another run is wiped off, but not where they are."""
        self._play = play
        self._notes = {NUMBER: play.number, WARNINGS: [], PLACE: self._notes.get(PLACE)}

    def restore(self, play: Play | None, notes: dict[str, Any]) -> dict[str, Any]:
        """Take over what was on a board that died, except where there is later news; returns everything."""
        if self._play is None:
            self._play = play
            warnings = notes.get(WARNINGS, []) + self._notes[WARNINGS]
            self._notes = {**notes, **self._notes, WARNINGS: warnings}
            self.ended(*self._ended)
        return self._notes

    def leave(self) -> None:
        """Tell the workers that there is no more."""
        self._over = True

    def play(self, after: int) -> tuple[Play | Literal["wait", "leave"], str]:
        """What is on for workers that have done with play `after`; and a word that is another after a death."""
        if self._over:
            return "leave", self._life
        has_ended = self._notes.get(ENDED) is not None
        waits = self._play is None or self._play.number <= after or has_ended
        return "wait" if waits or self._play is None else self._play, self._life

    def ended(self, number: int, images_seen: int) -> str:
        """The workers have left the loop of play `number`; returns the word that `play` does."""
        self._ended = number, images_seen  # for `restore`, if this board does not know its play yet
        if self._play is not None and number == self._play.number:
            self._notes[ENDED] = images_seen
        return self._life

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
        failures, failed_at = self._notes.get(FAILURES, (0, -1))
        failures = 1 if committed > failed_at else failures + 1
        self._notes[FAILURES] = failures, committed
        return failures

    def preempted(self) -> int:
        """Count a preemption; all there were."""
        self._notes[PREEMPTIONS] = self._notes.get(PREEMPTIONS, 0) + 1
        return self._notes[PREEMPTIONS]


class RunStateClient:
    """The driver's side of a board: what it says survives the board's death.

    Attributes:
        actor: the board, for controller and workers.
    """

    def __init__(self) -> None:
        self.actor = put_up()
        self._play: Play | None = None
        self._notes: dict[str, Any] = {}

    def begin(self, play: Play) -> None:
        """`Board.begin`; the board may still be starting, and is not waited for."""
        self._play = play
        self._notes = {NUMBER: play.number, PLACE: self._notes.get(PLACE)}
        self.actor.begin.remote(play)

    def note(self, subject: str, value: Any) -> None:
        """`Board.note`."""
        ray.get(self.actor.note.remote(subject, value))
        self._notes[subject] = value

    def read(self) -> dict[str, Any]:
        """Everything on the board; one that was started anew is told first what was there."""
        notes = ray.get(self.actor.read.remote())
        if NUMBER not in notes:
            notes = ray.get(self.actor.restore.remote(self._play, self._notes))
        self._notes = notes
        return dict(notes)

    def failed(self) -> int:
        """`Board.failed`."""
        self.read()
        return ray.get(self.actor.failed.remote())

    def preempted(self) -> int:
        """`Board.preempted`."""
        self.read()
        return ray.get(self.actor.preempted.remote())


def put_up() -> Any:
    """A new board, on this node: it lives as long as this process, started again if it dies before."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(num_cpus=0)(Board).options(**options).remote()
