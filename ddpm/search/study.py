"""A search on Ray Tune: Optuna proposes, ASHA stops early, and a callback of the driver writes outcomes.

Tune's own state is in a temporary folder, and is not read back: to continue a search is to list its runs. Trials that
have ended are added to Optuna's study with their values, and to ASHA with their rungs; the others are proposed first,
and resume as every run does.
"""

import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from ddpm.runs.run_folder import RunStatus
from ddpm.search.config import Arguments
from ddpm.search.space import Space
from ddpm.search.trainables import (
    FAILED,
    IMAGES_SEEN,
    NAME,
    VALUE,
    GroupTrial,
    Spec,
    result,
    train_trial,
)
from ddpm.search.trials import Trial, Trials, best
from ddpm.search.tune_callbacks import MAX_DEATHS, Interruption, Outcomes, Scoreboard
from ddpm.tracking.pusher import Pusher

STUDY = "search"
SEED = "train.seed"
MAX_KNOWN = 500
"""Known points that Optuna may propose in a row; then its space counts as exhausted."""


class GivenTrials(Searcher):
    """Proposes the given trials, in order."""

    def __init__(self, proposals: Sequence[dict[str, Any]]) -> None:
        super().__init__(metric=VALUE, mode="min")
        self._left = list(proposals)

    def suggest(self, trial_id: str) -> Any:
        return self._left.pop(0) if self._left else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass


class NewTrials(Searcher):
    """Proposes Optuna's points that the search does not know yet.

    If it proposes the point of a trial that has ended, it is told the value of that trial, and asked again. If the
    trial still runs, there is no proposal until it has ended.

    Args:
        propose: makes a proposal of a point.
        values: of the trials that have ended, by name; None: it has failed.
        warn: called with a line when the space is exhausted.
    """

    def __init__(
        self,
        optuna_search: OptunaSearch,
        propose: Callable[[Mapping[str, Any]], dict[str, Any]],
        values: Mapping[str, float | None],
        warn: Callable[[str], None],
    ) -> None:
        super().__init__(metric=VALUE, mode="min")
        self._optuna = optuna_search
        self._propose = propose
        self._values = dict(values)
        self._warn = warn
        self._num_points = 0
        """Number of points that Optuna has proposed."""
        self._pending: tuple[str, dict[str, Any]] | None = None
        """Optuna's id of a point whose trial runs, and the proposal of it again."""
        self._running: dict[str, str] = {}
        """Name of each trial that runs, by Tune's id."""
        self._optuna_ids: dict[str, str] = {}
        """Optuna's id of each trial that runs, by Tune's id."""

    def suggest(self, trial_id: str) -> Any:
        for _ in range(MAX_KNOWN):
            optuna_id, proposal = self._pending or self._ask()
            self._pending = None
            name = proposal[NAME]
            if name in self._running.values():
                self._pending = optuna_id, proposal
                return None
            if name not in self._values:
                self._running[trial_id] = name
                self._optuna_ids[trial_id] = optuna_id
                return proposal
            self._tell(optuna_id, self._values[name])
        self._warn(
            f"warning: the search ends early: {MAX_KNOWN} proposals in a row are known; the space is small"
        )
        return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        value = None
        if result is not None and FAILED not in result:
            value = result.get(VALUE)
        self._values[self._running.pop(trial_id)] = value
        self._tell(self._optuna_ids.pop(trial_id), value)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it to restore a search, which is never done

    def _ask(self) -> tuple[str, dict[str, Any]]:
        self._num_points += 1
        optuna_id = str(self._num_points)
        return optuna_id, self._propose(self._optuna.suggest(optuna_id) or {})

    def _tell(self, optuna_id: str, value: float | None) -> None:
        if value is None:
            self._optuna.on_trial_complete(optuna_id, error=True)
        else:
            self._optuna.on_trial_complete(optuna_id, {VALUE: value})


@dataclass
class Study:
    """The trials of a search, run by Ray Tune on the connected cluster."""

    arguments: Arguments
    space: Space
    spec: Spec
    trials: Trials
    pusher: Pusher
    reserved: dict[str, float]
    """CPUs and GPUs that Tune reserves for a trial."""
    has_groups: bool
    """Whether a trial has several workers."""
    interruption: Interruption
    scoreboard: Scoreboard

    def run(self) -> None:
        """Run what is left of the search's own trials, and then of the finalists' further trainings."""
        own = [trial for trial in self.trials.all() if trial.repeats is None]
        ended = [trial for trial in own if trial.has_ended]
        unfinished = [trial.changes for trial in own if not trial.has_ended]
        if self.arguments.searcher == "grid":
            known = [trial.changes for trial in own]
            points = unfinished + [point for point in self._grid() if point not in known]
            proposals = [self.spec.proposal(point) for point in points]
            self._tune(GivenTrials(proposals), self._asha(ended), len(proposals))
        else:
            num_trials = max(self.arguments.num_trials - len(ended), len(unfinished))
            self._tune(self._new_trials(unfinished, ended), self._asha(ended), num_trials)
        if not self.interruption.is_on:
            again = self._further_trainings()
            self._tune(GivenTrials(again), FIFOScheduler(), len(again))

    def _further_trainings(self) -> list[dict[str, Any]]:
        """Proposals of the trainings of finalists with other seeds that are left."""
        chosen = self.arguments
        seed = self.spec.config.train.seed
        finalists = best(self.trials.all())[: chosen.finalists]
        finished = [trial for trial in finalists if trial.status == RunStatus.FINISHED]
        wanted = []
        for other in range(seed + 1, seed + chosen.finalist_seeds):
            for trial in finished:
                proposal = self.spec.proposal({**trial.changes, SEED: other}, repeats=trial.name)
                known = self.trials.get(proposal[NAME])
                if known is None or not known.has_ended:
                    wanted.append(proposal)
        return wanted

    def _grid(self) -> list[dict[str, Any]]:
        """The points of a grid. Optuna's GridSampler supports no keys that depend on another key's value."""
        num_trials = self.arguments.num_trials
        points = self.space.grid(num_trials + 1)
        if len(points) > num_trials:
            self.scoreboard.news(
                f"warning: the grid has more points than the first {num_trials} (--num-trials), which are tried"
            )
        return points[:num_trials]

    def _new_trials(self, unfinished: Sequence[Mapping[str, Any]], ended: Sequence[Trial]) -> NewTrials:
        """The searcher: Optuna, which is told of the trials that have ended, and proposes the unfinished ones first."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = InMemoryStorage()
        study = optuna.create_study(storage=storage, study_name=STUDY, direction="minimize")
        for trial in ended:
            study.add_trial(self._as_optuna_trial(trial))
        for changes in unfinished:
            study.enqueue_trial(dict(changes))
        seed = self.arguments.seed + len(self.trials.all())  # else a new driver would repeat its proposals
        sampler: optuna.samplers.BaseSampler
        if self.arguments.searcher == "random":
            sampler = optuna.samplers.RandomSampler(seed=seed)
        else:
            sampler = optuna.samplers.TPESampler(seed=seed)
        space: Any = self.space.suggest
        optuna_search = OptunaSearch(
            space, metric=VALUE, mode="min", sampler=sampler, storage=storage, study_name=STUDY
        )
        values = {trial.name: _value(trial) for trial in ended}
        return NewTrials(optuna_search, self.spec.proposal, values, self.scoreboard.news)

    def _as_optuna_trial(self, trial: Trial) -> optuna.trial.FrozenTrial:
        """A trial that has ended; one that was stopped early has its last value, as OptunaSearch reports it."""
        params = {key: value for key, value in trial.changes.items() if key in self.space.domains}
        value = _value(trial)
        return create_trial(
            state=TrialState.FAIL if value is None else TrialState.COMPLETE,
            params=params,
            distributions={key: self.space.domains[key] for key in params},
            value=value,
        )

    def _asha(self, ended: Sequence[Trial]) -> TrialScheduler:
        """ASHA (Li et al. 2020, arXiv:1810.05934), with the rungs of the trials that have ended."""
        at = self.spec.rungs.at
        if len(at) == 1:
            return FIFOScheduler()
        scheduler = ASHAScheduler(
            time_attr=IMAGES_SEEN,
            metric=VALUE,
            mode="min",
            grace_period=at[0],
            max_t=at[-1],
            reduction_factor=self.arguments.reduction_factor,
        )
        for trial in ended:
            known: Any = SimpleNamespace(trial_id=trial.name)  # ASHA reads nothing else of a trial (Ray 2.60)
            scheduler.on_trial_add(None, known)  # type: ignore[arg-type]
            for evaluation in trial.rungs:
                scheduler.on_trial_result(None, known, result(evaluation))  # type: ignore[arg-type]
        return scheduler

    def _tune(self, search: Searcher, scheduler: TrialScheduler, num_trials: int) -> None:
        """Run trials until `num_trials` have ended, or `search` proposes no more."""
        if num_trials == 0:
            return
        # A trial's error is in its folder, in one line.
        level = logging.INFO if self.spec.verbose else logging.CRITICAL
        logging.getLogger("ray.tune").setLevel(level)
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        # The new output prints a box at any verbosity (Ray 2.60).
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        kind: Any = GroupTrial if self.has_groups else train_trial
        trainable = tune.with_resources(tune.with_parameters(kind, spec=self.spec), self.reserved)
        outcomes = Outcomes(self.trials, self.spec, self.pusher, self.interruption, self.scoreboard)
        with tempfile.TemporaryDirectory(prefix="ddpm-ray-tune-") as folder:
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=scheduler,
                    num_samples=num_trials,
                    max_concurrent_trials=self.arguments.max_concurrent,
                    reuse_actors=not self.has_groups,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=folder,
                    verbose=0,
                    stop=self.interruption,
                    callbacks=[outcomes],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
                ),
            )
            tuner.fit()


def _value(trial: Trial) -> float | None:
    """What Optuna is told of a trial that has ended; None: it has failed."""
    has_failed = trial.status == RunStatus.FAILED or not math.isfinite(trial.bits_per_dim)
    return None if has_failed else trial.bits_per_dim
