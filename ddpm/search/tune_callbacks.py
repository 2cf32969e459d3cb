"""What Ray Tune calls in the driver of a search: the outcomes of trials, and whether the search is interrupted."""

import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from ddpm.search.publisher import Publisher
from ddpm.search.trainables import FAILED, IMAGES_SEEN, Spec
from ddpm.search.trials import Outcome, Trials, changes_text, shown
from ddpm.training.monitor import StopSignals

MAX_DEATHS = 3
"""Number of times that a trial's process may die and resume from its checkpoint; one more, and the trial has failed."""


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
        return {}  # Tune pickles it, to restore a search; ours is never restored


class Outcomes(tune.Callback):
    """Writes the outcomes of trials into their folders, and notifies the publisher.

    Args:
        repeats: name of the trial that each trial with these changes repeats; None: none does.
        news: called with a line for each event.
        tick: called at each step of Tune's loop.
    """

    def __init__(
        self,
        trials: Trials,
        spec: Spec,
        publisher: Publisher,
        interruption: Interruption,
        news: Callable[[str], None],
        tick: Callable[[], None],
        repeats: Callable[[Mapping[str, Any]], str | None] = lambda changes: None,
    ) -> None:
        self._trials = trials
        self._spec = spec
        self._publisher = publisher
        self._interruption = interruption
        self._news = news
        self._tick = tick
        self._repeats = repeats
        self._names: dict[str, str] = {}
        """Name of the run of each trial, by Tune's id."""
        self._owner: dict[str, str] = {}
        """Tune's id of the trial that trains a run: of two equal proposals, the first."""
        self._began_at: dict[str, float] = {}
        self._shown: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as above

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._tick()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        name = self._name(trial)
        known = self._trials.get(name)
        if known is not None and known.status != "running":
            self._owner.setdefault(name, "")  # it has ended: no trial of Tune's trains it
        if self._owner.setdefault(name, trial.trial_id) != trial.trial_id:
            self._news(f"{name} is proposed again: {changes_text(trial.config)}")
            return
        self._began_at[name] = time.monotonic()
        self._trials.begin(name, trial.config, self._repeats(trial.config))
        self._news(f"{name} {'begins' if known is None else 'resumes'}: {changes_text(trial.config)}")
        self._publisher.notify(name)  # so that MLflow shows the search from its start

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        name = self._name(trial)
        if not self._owns(trial) or FAILED in result:
            return
        found = self._trials.read_rungs(name)
        if result[IMAGES_SEEN] > self._shown.get(name, 0):
            self._shown[name] = result[IMAGES_SEEN]
            for evaluation in found.rungs:
                if evaluation.images_seen == result[IMAGES_SEEN]:
                    bound = shown(evaluation.bits_per_dim)
                    self._news(f"{name} after {evaluation.images_seen:,} images: {bound} bits/dim")
        self._publisher.notify(name)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        if not self._owns(trial) or self._interruption.is_on:
            return
        last = trial.last_result or {}
        if FAILED in last:
            self._end(trial, "failed", last[FAILED])
        elif last.get(IMAGES_SEEN, 0) >= self._spec.rungs.at[-1]:
            self._end(trial, "finished")
        else:
            self._end(trial, "stopped")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if self._owns(trial) and not self._interruption.is_on:
            self._end(trial, "failed", f"its process died more than {MAX_DEATHS} times")

    def _end(self, trial: TuneTrial, status: Outcome, reason: str = "") -> None:
        name = self._name(trial)
        wall_s = time.monotonic() - self._began_at.get(name, time.monotonic())
        self._trials.end(name, status, reason, wall_s)
        self._news(f"{name} {status}" + (f": {reason}" if reason else ""))
        self._publisher.notify(name)

    def _owns(self, trial: TuneTrial) -> bool:
        """Whether this trial trains its run; False: it is an equal proposal, which reports the first one's results."""
        return self._owner.get(self._name(trial)) == trial.trial_id

    def _name(self, trial: TuneTrial) -> str:
        if trial.trial_id not in self._names:
            self._names[trial.trial_id] = str(self._spec.configured(trial.config).run.name)
        return self._names[trial.trial_id]
