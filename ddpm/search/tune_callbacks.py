"""What Ray Tune calls in the driver of a search: display, interruption, and the outcomes of trials."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from ddpm.runs.run_folder import RunFolder, RunStatus
from ddpm.search.trainables import (
    CHANGES,
    EVALUATION,
    FAILED,
    IMAGES_SEEN,
    NAME,
    REPEATS,
    Spec,
)
from ddpm.search.trials import Trial, Trials, changes_text, shown
from ddpm.tracking.pusher import Pusher
from ddpm.training.fit import store_status
from ddpm.training.monitor import StopSignals
from ddpm.utils.progress import LINE_INTERVAL_S, LiveText
from ddpm.utils.tables import Table

MAX_DEATHS = 3
"""Number of times that a trial's process may die and resume from its checkpoint; one more, and the trial has failed."""
SHOWN = 30
"""Largest number of trials in the live table, which shows the newest."""


class Scoreboard:
    """Shows a search: a live table in a terminal; elsewhere a line per event, or per interval without.

    Args:
        trials: returns the trials so far.
        num_trials: total number of trials, besides finalists that are trained again.
    """

    def __init__(self, trials: Callable[[], Sequence[Trial]], num_trials: int) -> None:
        self._trials = trials
        self._num_trials = num_trials
        self.display = LiveText(self._text) if sys.stdout.isatty() else nullcontext()
        """A context that has the terminal."""
        self._began = time.monotonic()
        self._line_at = self._began

    def news(self, line: str) -> None:
        """Show an event."""
        if isinstance(self.display, LiveText):
            self.display.refresh()
        else:
            self._line_at = time.monotonic()
            print(line, flush=True)

    def tick(self) -> None:
        """Print the running trials once per interval, without a terminal; to be called often."""
        now = time.monotonic()
        if not isinstance(self.display, LiveText) and now - self._line_at >= LINE_INTERVAL_S:
            trials = self._trials()
            running = ", ".join(trial.name for trial in trials if not trial.has_ended) or "none"
            done = f"{self._done(trials)} done after {now - self._began:.0f} s"
            self.news(f"{done}, running: {running}")

    def _text(self) -> str:
        trials = self._trials()
        rows = []
        for trial in trials[-SHOWN:]:
            status = trial.outcome + (f": {trial.reason}" if trial.reason else "")
            row = [trial.name, status, "", "", changes_text(trial.changes)]
            if trial.last:
                row[2] = f"{trial.images_seen:,}"
                row[3] = shown(trial.last.bits_per_dim)
            rows.append(row)
        table = Table(["trial", "status", "images", "bits/dim", "changes"], rows, num_words=2)
        return f"{self._done(trials)}\n{table.text(1000) if rows else ''}"

    def _done(self, trials: Sequence[Trial]) -> str:
        over = sum(trial.has_ended for trial in trials)
        return f"{over} of {max(self._num_trials, len(trials))} trials"


class Interruption(StopSignals, tune.Stopper):
    """A context in which a signal, or `is_lost`, ends all trials; they resume from their newest checkpoints."""

    def __init__(self, is_lost: Callable[[], bool]) -> None:
        self._is_lost = is_lost
        self._announced = False

    @property
    def is_on(self) -> bool:
        return self.signal is not None or self._is_lost()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.signal is not None and not self._announced:
            self._announced = True
            name = signal.Signals(self.signal).name
            print(
                f"{name}: the trials stop, and resume from their newest checkpoints{self.again}",
                file=sys.stderr,
            )
        return self.is_on

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it to restore a search, which is never done


class Outcomes(tune.Callback):
    """Creates the runs of trials, writes into their folders how they ended, and pushes them.

    A trial that an interruption stops has not ended.
    """

    def __init__(
        self, trials: Trials, spec: Spec, pusher: Pusher, interruption: Interruption, scoreboard: Scoreboard
    ) -> None:
        self._trials = trials
        self._spec = spec
        self._pusher = pusher
        self._interruption = interruption
        self._scoreboard = scoreboard
        self._runs: dict[str, RunFolder] = {}
        """By name."""
        self._began_at: dict[str, float] = {}
        """By name."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as above

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._scoreboard.tick()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        name = trial.config[NAME]
        changes = trial.config[CHANGES]
        verb = "begins" if self._trials.get(name) is None else "resumes"
        self._open(trial)
        self._scoreboard.news(f"{name} {verb}: {changes_text(changes)}")
        self._pusher.begin()

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        name = trial.config[NAME]
        if FAILED in result:
            return
        found = result[EVALUATION]
        if self._trials.reach(name, found):
            bound = shown(found.bits_per_dim)
            self._scoreboard.news(f"{name} after {found.images_seen:,} images: {bound} bits/dim")
        self._pusher.notify(name)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        last = trial.last_result or {}
        if FAILED in last:
            self._end(trial, RunStatus.FAILED, last[FAILED])
        elif last.get(IMAGES_SEEN, 0) >= self._spec.rungs.at[-1]:
            self._end(trial, RunStatus.FINISHED)
        else:
            self._end(trial, RunStatus.PRUNED)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._end(trial, RunStatus.FAILED, f"its process died more than {MAX_DEATHS} times")

    def _open(self, trial: TuneTrial) -> None:
        name = trial.config[NAME]
        self._began_at[name] = time.monotonic()
        self._trials.begin(name, trial.config[CHANGES], trial.config[REPEATS])
        self._runs[name] = self._spec.open_run(trial.config)
        self._pusher.add_run(self._runs[name])

    def _end(self, trial: TuneTrial, status: RunStatus, reason: str = "") -> None:
        if self._interruption.is_on:
            return
        name = trial.config[NAME]
        if name not in self._runs:  # its process could not be started
            self._open(trial)
        # First: a driver that is killed in between resumes the trial, and writes both again.
        store_status(self._runs[name], status)
        ended = self._trials.end(name, status, reason, time.monotonic() - self._began_at[name])
        self._scoreboard.news(f"{name} {ended.outcome}" + (f": {reason}" if reason else ""))
        self._pusher.notify(name)
