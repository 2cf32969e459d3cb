"""The trial manager: proposals and early stops of trials, from an event log that survives the search's driver.

It does not use Ray. Optuna's proposals are a deterministic function of the events, so replaying the log restores its
state; an early stop follows from the rungs in the log.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from ddpm.search import event_log
from ddpm.search.config import Metric, Searcher
from ddpm.search.event_log import Begun, Ended, Evaluated, Event, EventLog, Outcome, Rung, Trial, name_of
from ddpm.search.space import Space
from ddpm.utils.errors import UserError

STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
"""Optuna's state of a trial that has ended."""


class OptunaProposer:
    """Optuna's TPE, random search, or a grid with `grid_points` of each range.

    TPE begins with ten random trials, and then searches where good trials are denser than others. A grid is enqueued:
    Optuna's GridSampler knows no keys that depend on another key's value.

    Args:
        most: the largest number of points of a grid; None: all.
    """

    def __init__(
        self,
        space: Space,
        seed: int,
        searcher: Searcher = "optuna",
        grid_points: int = 1,
        most: int | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        kind = optuna.samplers.TPESampler if searcher == "optuna" else optuna.samplers.RandomSampler
        self.study = optuna.create_study(direction="minimize", sampler=kind(seed=seed))
        self._space, self._trials = space, dict[int, optuna.Trial]()
        self.grid = space.grid(grid_points, most) if searcher == "grid" else None
        """Its points, if the searcher is a grid."""

    def suggest(self, number: int) -> dict[str, Any]:
        """The changes of the search's own trial `number`; called once per trial, in order."""
        if self.grid is not None:
            self.study.enqueue_trial(self.grid[len(self._trials)])
        trial = self._trials[number] = self.study.ask()
        return self._space.suggest(trial)

    def record(self, event: Evaluated | Ended, value: float | None) -> None:
        """Receive the value of a trial at a rung (lower is better), or its end and its last value; None: it has none.

        A stopped trial is reported as PRUNED, with the values of its rungs: TPE ranks it below every finished one, and
        below those stopped later. Ray Tune's OptunaSearch reports it as COMPLETE with its last value (Ray 2.60).
        """
        trial = self._trials[event.trial]
        match event:
            case Evaluated() if value is not None:
                trial.report(value, event.rung.images_seen)
            case Ended():  # only for a finished one does tell() take a value
                self.study.tell(trial, value if event.status == "finished" else None, STATES[event.status])


@dataclass
class TrialManager:
    """The trials of a search."""

    events: EventLog
    """The search's event log; its events are replayed to the proposer."""
    proposer: OptunaProposer
    metric: Metric
    """The metric of proposals and early stops."""
    num_trials: int
    total_images: int
    """Length of a finished trial."""
    reduction_factor: int
    """At each rung before that, the best 1 / reduction_factor of the trials continue."""
    news: Callable[[str], None]
    """Called with a line for each event."""
    finalists: int = 0
    """How many of the best configurations are trained again after the search's own trials."""
    seeds: Sequence[int] = ()
    """The values of train.seed for that, a training each."""

    def __post_init__(self) -> None:
        self._began_at: dict[int, float] = {}
        self._trained: dict[int, tuple[float, float]] = {}
        """wall_s and training_s of the trials whose training is over."""
        if self.proposer.grid is not None:
            self.num_trials = min(self.num_trials, len(self.proposer.grid))
        for event in self.events.events:
            match event:
                case Begun(number, changes, repeats=None) if self.proposer.suggest(number) != changes:
                    raise UserError(
                        f"the searcher proposes a different {name_of(number)} than the event log holds, since its "
                        "version has changed; give the search another --name"
                    )
            self._tell_proposer(event)
        self.recall()

    @property
    def trials(self) -> list[Trial]:
        return self.events.trials()

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended, and there are no more."""
        running = any(trial.status == "running" for trial in self.trials)
        return not running and not self._due()

    @property
    def num_left(self) -> int:
        """Number of trials to start or to resume, as far as they are known."""
        return len(self._waiting) + len(self._due())

    def _due(self) -> list[tuple[int | None, dict[str, Any]]]:
        """What is to begin, as far as it is known: (None, {}) for a proposal, or a trial to repeat and the changes.

        The finalists are known when all of the search's own trials have ended.
        """
        own = [trial for trial in self.trials if trial.repeats is None]
        if len(own) < self.num_trials or any(trial.status == "running" for trial in own):
            return [(None, {})] * (self.num_trials - len(own))
        begun = [(trial.repeats, trial.changes) for trial in self.trials]
        finalists = event_log.best(self.trials, self.metric)[: self.finalists]
        whole = [trial for trial in finalists if trial.status == "finished"]
        wanted = [
            (trial.number, {**trial.changes, "train.seed": seed}) for seed in self.seeds for trial in whole
        ]
        return [repetition for repetition in wanted if repetition not in begun]

    def recall(self) -> None:
        """Mark all trials that have not ended as waiting, since no process runs them."""
        self._waiting = [trial.number for trial in self.trials if trial.status == "running"]
        self._began_at.clear()
        self._num_reserved = 0
        """Number of free slots whose next trial has not begun."""

    def next(self) -> tuple[int, dict[str, Any]] | None:
        """A trial to start or to resume: its number and its changes. None: there are no more."""
        self._num_reserved = max(0, self._num_reserved - 1)
        if not self.num_left:
            return None
        if self._waiting:
            number = self._waiting.pop(0)
            self.news(f"{name_of(number)} resumes")
        else:
            number = len(self.trials)
            repeats, changes = self._due()[0]
            if repeats is None:
                changes = self.proposer.suggest(number)
            self._record(Begun(number, changes, repeats))
            self.news(f"{name_of(number)} begins: {changes_text(changes)}")
        self._began_at[number] = time.monotonic()
        return number, dict(self.trials[number].changes)

    def trained(self, number: int, training_s: float) -> bool:
        """Record the end of a trial's training; returns whether its slot goes to the next trial at once."""
        if self.trials[number].status != "running":
            return False
        self._trained.setdefault(number, (time.monotonic() - self._began_at[number], training_s))
        if self.num_left <= self._num_reserved:
            return False
        self._num_reserved += 1
        return True

    def evaluated(self, number: int, rung: Rung) -> bool:
        """Whether the trial may continue after a rung. A repeated rung, of a trial run again, gets the same answer."""
        if self.trials[number].status != "running":
            return False
        repeated = [
            event
            for event in self.events.events
            if isinstance(event, Evaluated)
            and (event.trial, event.rung.images_seen) == (number, rung.images_seen)
        ]
        if repeated:
            should_continue = repeated[0].should_continue
        else:
            should_continue = rung.images_seen < self.total_images and self._is_promoted(number, rung)
            self._record(Evaluated(number, rung, should_continue))
            self.news(f"{name_of(number)} after {rung.images_seen:,} images: {rung.shown} bits/dim")
        if not should_continue:
            self._end(number, "finished" if rung.images_seen >= self.total_images else "stopped", "")
        return should_continue

    def failed(self, number: int, reason: str) -> None:
        self._end(number, "failed", reason)

    def _is_promoted(self, number: int, rung: Rung) -> bool:
        """Whether a trial is among the best of those evaluated at this rung so far, or repeats a finalist.

        Source: asynchronous successive halving (ASHA), Li et al. 2020 (arXiv:1810.05934).
        """
        seen = [
            other.value(self.metric)
            for trial in self.trials
            for other in trial.rungs
            if other.images_seen == rung.images_seen and trial.repeats is None
        ]
        if not seen or self.trials[number].repeats is not None:
            return True
        return bool(rung.value(self.metric) <= np.percentile(seen, 100 / self.reduction_factor))

    def _end(self, number: int, status: Outcome, reason: str) -> None:
        trial = self.trials[number]
        if trial.status != "running":
            return
        so_far = time.monotonic() - self._began_at[number], trial.last.training_s if trial.last else 0.0
        self._record(Ended(number, status, reason, *self._trained.get(number, so_far)))
        self.news(f"{name_of(number)} {status}" + (f": {reason}" if reason else ""))

    def _record(self, event: Event) -> None:
        self.events.add(event)
        self._tell_proposer(event)

    def _tell_proposer(self, event: Event) -> None:
        if isinstance(event, Evaluated | Ended) and self.trials[event.trial].repeats is None:
            # No rung follows a trial's end.
            rung = event.rung if isinstance(event, Evaluated) else self.trials[event.trial].last
            self.proposer.record(event, rung.value(self.metric) if rung else None)


def changes_text(changes: Mapping[str, Any]) -> str:
    """Changes as text: optim.lr 0.00123, schedule.kind cosine."""
    return ", ".join(f"{key} {short(value)}" for key, value in changes.items()) or "nothing changed"


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
