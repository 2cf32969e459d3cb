"""The actor that hands one run after another to workers that stay (persistent_group.py)."""

from dataclasses import dataclass
from typing import Any, Literal

from ddpm.training import run_state
from ddpm.training.run_state import RunState

RUN = "run"
"""Subject: the Task that the other values are of."""


@dataclass(frozen=True)
class Task:
    """A run as the workers receive it."""

    number: int
    """Number of the run, from 1."""
    arguments: Any
    """A Ray reference to the workers' arguments; the actor, a small process, does not fetch them."""


class RunQueue(RunState):
    """The state of one run after another; the value of RUN is its Task."""

    _closed = False

    def set(self, subject: str, value: Any) -> None:
        """`RunState.set`; with a new run, the values of the previous one are dropped, except PLACEMENT_GROUP."""
        if subject == RUN:
            kept = self._values.get(run_state.PLACEMENT_GROUP)
            self._values = {run_state.WARNINGS: [], run_state.PLACEMENT_GROUP: kept}
        super().set(subject, value)

    def close(self) -> None:
        """Tell the workers that no other run follows."""
        self._closed = True

    def next_run(self, after: int, ended: int | None) -> Task | Literal["wait", "leave"]:
        """The run for workers that have finished run `after`; rank 0 reports `ended`, its images_seen at the end.

        It does so at each call, since another actor, after the death of one, may not know it.
        """
        task = self._values.get(RUN)
        is_after = task is not None and task.number == after
        if is_after and ended is not None:
            self._values[run_state.ENDED] = ended
        if self._closed or (is_after and self._values.get(run_state.STOP) in run_state.ENDS_GROUP):
            return "leave"
        if task is None or task.number <= after or self._values.get(run_state.ENDED) is not None:
            return "wait"
        return task
