"""The trial manager: proposals and early stops of trials, from an event log that survives the search's driver.

It does not use Ray. The proposer (Optuna) and the stopper (ASHA) are deterministic functions of the events, so
replaying the log restores their state.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ddpm.search.event_log import EventLog, Metric, Rung, Status, Trial, name_of
from ddpm.utils.errors import UserError


class Proposer(Protocol):
    """Proposes the changes of trials to the config."""

    def suggest(self, number: int) -> dict[str, Any] | None:
        """The changes of trial `number`; called once per trial, in order. None: there are no more trials."""

    def evaluated(self, number: int, images_seen: int, value: float) -> None:
        """Receive the value of a trial at a rung; lower is better."""

    def ended(self, number: int, status: Status, value: float | None) -> None:
        """Receive the end of a trial and its last value; None: it reached no rung."""


class Stopper(Protocol):
    """Compares trials at equal images seen."""

    def should_continue(self, number: int, images_seen: int, value: float) -> bool:
        """Whether the trial may continue, given all values so far."""


class TrialManager:
    """The trials of a search.

    Args:
        events: the search's event log; its events are replayed to proposer and stopper.
        metric: the metric for both.
        num_trials: total number of trials.
        total_images: length of a finished trial.
        news: called with a line for each event.

    Raises:
        UserError: the proposer does not repeat its proposals.
    """

    def __init__(
        self,
        events: EventLog,
        proposer: Proposer,
        stopper: Stopper,
        metric: Metric,
        num_trials: int,
        total_images: int,
        news: Callable[[str], None],
    ) -> None:
        self._events, self._proposer, self._stopper, self._metric = events, proposer, stopper, metric
        self._num_trials, self._total_images, self._news = num_trials, total_images, news
        self._trials: dict[int, Trial] = {}
        self._began_at: dict[int, float] = {}
        self._took: dict[int, tuple[float, float]] = {}
        """wall_s and training_s of the trained trials."""
        self._exhausted, self._promised = False, 0
        for event in events.events:
            self._replay(event)
        self.recall()

    @property
    def trials(self) -> list[Trial]:
        return self._events.trials()

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended, and there are no more."""
        running = any(trial.status == "running" for trial in self._trials.values())
        return not running and (self._exhausted or len(self._trials) >= self._num_trials)

    @property
    def num_left(self) -> int:
        """Number of trials to start or to resume."""
        return max(len(self._waiting), self._num_trials - len(self._trials) + len(self._waiting))

    def recall(self) -> None:
        """Mark all trials that have not ended as waiting, since no process runs them."""
        self._waiting = [trial.number for trial in self._trials.values() if trial.status == "running"]
        self._began_at.clear()

    def next(self) -> tuple[int, dict[str, Any]] | None:
        """A trial to start or to resume: its number and its changes. None: there are no more."""
        self._promised = max(0, self._promised - 1)
        if not self._waiting and not self._draw():
            return None
        number = self._waiting.pop(0)
        if number not in self._began_at:
            self._news(f"{name_of(number)} resumes")
            self._began_at[number] = time.monotonic()
        return number, dict(self._trials[number].changes)

    def trained(self, number: int, training_s: float) -> bool:
        """Record the end of a trial's training; returns whether its slot goes to the next trial at once."""
        if self._trials[number].status != "running":
            return False
        self._took.setdefault(number, (time.monotonic() - self._began_at[number], training_s))
        if len(self._waiting) <= self._promised and not self._draw():
            return False
        self._promised += 1
        return True

    def evaluated(self, number: int, rung: Rung) -> bool:
        """Whether the trial may continue after a rung. A repeated rung, of a trial run again, gets the same answer."""
        if self._trials[number].status != "running":
            return False
        should_continue = self._earlier_answer(number, rung.images_seen)
        if should_continue is None:
            should_continue = self._consult(number, rung)
            self._events.add("judged", number, **dataclasses.asdict(rung), goes_on=should_continue)
            self._news(f"{name_of(number)} after {rung.images_seen:,} images: {rung.shown} bits/dim")
        if not should_continue:
            self._end(number, "finished" if rung.images_seen >= self._total_images else "stopped", "")
        return should_continue

    def failed(self, number: int, reason: str) -> None:
        self._end(number, "failed", reason)

    def _draw(self) -> bool:
        """Add a new trial to those that wait for a slot; returns whether there was one."""
        number = len(self._trials)
        changes = self._proposer.suggest(number) if number < self._num_trials else None
        if changes is None:
            self._exhausted = True
            return False
        self._trials[number] = Trial(number, changes)
        self._events.add("begun", number, changes=changes)
        self._news(f"{name_of(number)} begins: {changes_text(changes)}")
        self._began_at[number] = time.monotonic()
        self._waiting.append(number)
        return True

    def _earlier_answer(self, number: int, images_seen: int) -> bool | None:
        """The earlier answer for a rung; None: there is none."""
        for event in self._events.events:
            if (event["event"], event["trial"], event.get("images_seen")) == ("judged", number, images_seen):
                return bool(event["goes_on"])
        return None

    def _consult(self, number: int, rung: Rung) -> bool:
        """Pass a rung to proposer and stopper; returns whether the trial continues."""
        trial, value = self._trials[number], rung.value(self._metric)
        self._trials[number] = dataclasses.replace(trial, rungs=(*trial.rungs, rung))
        self._proposer.evaluated(number, rung.images_seen, value)
        should_continue = self._stopper.should_continue(number, rung.images_seen, value)
        return should_continue and rung.images_seen < self._total_images

    def _end(self, number: int, status: Status, reason: str) -> None:
        if self._trials[number].status != "running":
            return
        last = self._trials[number].last
        so_far = time.monotonic() - self._began_at[number], last.training_s if last else 0.0
        wall_s, training_s = self._took.get(number, so_far)
        took = {"wall_s": wall_s, "training_s": training_s}
        self._replay(self._events.add("ended", number, status=status, reason=reason, **took))
        self._news(f"{name_of(number)} {status}" + (f": {reason}" if reason else ""))

    def _replay(self, event: Mapping[str, Any]) -> None:
        """Replay an event to proposer and stopper."""
        number = event["trial"]
        match event["event"]:
            case "begun":
                if self._proposer.suggest(number) != event["changes"]:
                    raise UserError(
                        f"the searcher proposes a different {name_of(number)} than the event log holds, since its "
                        "version has changed; give the search another --name"
                    )
                self._trials[number] = Trial(number, event["changes"])
            case "judged":
                keys = [f.name for f in dataclasses.fields(Rung)]
                self._consult(number, Rung(**{key: event[key] for key in keys}))
            case "ended":
                trial = self._trials[number]
                self._trials[number] = dataclasses.replace(trial, status=event["status"])
                value = trial.last.value(self._metric) if trial.last else None
                self._proposer.ended(number, event["status"], value)


def changes_text(changes: Mapping[str, Any]) -> str:
    """Changes as text: optim.lr 0.00123, schedule.kind cosine."""
    return ", ".join(f"{key} {short(value)}" for key, value in changes.items()) or "nothing changed"


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
