"""A search on Ray Tune: Optuna proposes, ASHA stops early, and a callback of the driver writes outcomes.

Tune's own state is in a temporary folder, and is not read back: to continue a search is to list its runs. Trials that
have ended are added to Optuna's study with their values, and to ASHA with their rungs; the others are enqueued, and
resume as every run does.
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
from ray.tune.search.optuna import OptunaSearch

from ddpm.search.config import Arguments
from ddpm.search.publisher import Publisher
from ddpm.search.space import Space
from ddpm.search.trainables import IMAGES_SEEN, VALUE, GroupTrial, Spec, result, train_trial
from ddpm.search.trials import Trial, Trials, best
from ddpm.search.tune_callbacks import MAX_DEATHS, Interruption, Outcomes

STUDY = "search"
SEED = "train.seed"


@dataclass(frozen=True)
class Proposal:
    """The space of OptunaSearch, as a function that Tune can pickle."""

    space: Space
    with_seed: bool
    """Also ask for a value of train.seed."""

    def __call__(self, trial: optuna.Trial) -> None:
        self.space.suggest(trial)
        if self.with_seed:
            trial.suggest_int(SEED, 0, 2**62)


@dataclass(frozen=True)
class Repetition:
    """A further training of a finalist, with another seed."""

    repeats: str
    """Name of the finalist."""
    changes: dict[str, Any]


@dataclass
class Study:
    """The trials of a search, run by Ray Tune on the connected cluster."""

    arguments: Arguments
    space: Space
    spec: Spec
    trials: Trials
    publisher: Publisher
    reserved: dict[str, float]
    """CPUs and GPUs that Tune reserves for a trial."""
    has_groups: bool
    """Whether a trial has several workers."""
    interruption: Interruption
    news: Callable[[str], None]
    """Called with a line for each event."""
    tick: Callable[[], None]
    """Called at each step of Tune's loop."""

    def run(self) -> None:
        """Run what is left of the search's own trials, and then of the finalists' further trainings."""
        grid = self._grid()
        num_trials = self.arguments.num_trials
        if grid is not None:
            num_trials = min(num_trials, len(grid))
        own = [trial for trial in self.trials.all() if trial.repeats is None]
        ended = [trial for trial in own if trial.status != "running"]
        begun = [trial.changes for trial in own if trial.status == "running"]
        known = [trial.changes for trial in own]
        points = list(begun)
        if grid is not None:
            points += [point for point in grid if point not in known]
        num_samples = max(num_trials - len(ended), len(begun))
        if num_samples > 0:
            search = self._search(points, ended)
            self._tune(search, self._scheduler(ended), num_samples)
        self._repeat_finalists()

    def _repeat_finalists(self) -> None:
        """Train the best configurations again, with other seeds."""
        wanted = self._repetitions()
        if not wanted or self.interruption.is_on:
            return
        names = {self._key(training.changes): training.repeats for training in wanted}

        def repeats(changes: Mapping[str, Any]) -> str:
            return names[self._key(changes)]

        search = self._search([training.changes for training in wanted], [], with_seed=True)
        self._tune(search, FIFOScheduler(), len(wanted), repeats)

    def _repetitions(self) -> list[Repetition]:
        """The trainings that are left."""
        chosen = self.arguments
        seed = self.spec.config.train.seed
        finalists = best(self.trials.all())[: chosen.finalists]
        whole = [trial for trial in finalists if trial.status == "finished"]
        wanted = []
        for other in range(seed + 1, seed + chosen.finalist_seeds):
            for trial in whole:
                changes = {**trial.changes, SEED: other}
                known = self.trials.get(str(self.spec.configured(changes).run.name))
                if known is None or known.status == "running":
                    wanted.append(Repetition(trial.name, changes))
        return wanted

    @staticmethod
    def _key(changes: Mapping[str, Any]) -> str:
        return repr(sorted(changes.items()))

    def _grid(self) -> list[dict[str, Any]] | None:
        """The points of a grid. Optuna's GridSampler supports no keys that depend on another key's value."""
        chosen = self.arguments
        if chosen.searcher != "grid":
            return None
        points = self.space.grid(chosen.num_trials + 1)
        if len(points) > chosen.num_trials:
            self.news(
                f"warning: the grid has more points than the first {chosen.num_trials} (--num-trials), which are tried"
            )
        return points[: chosen.num_trials]

    def _search(
        self, points: Sequence[Mapping[str, Any]], ended: Sequence[Trial], with_seed: bool = False
    ) -> OptunaSearch:
        """Optuna with what is known of the trials that have ended, which proposes `points` first."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = InMemoryStorage()
        study = optuna.create_study(storage=storage, study_name=STUDY, direction="minimize")
        for trial in ended:
            study.add_trial(self._as_optuna_trial(trial))
        for point in points:
            study.enqueue_trial(dict(point))
        seed = self.arguments.seed + len(self.trials.all())  # else a new driver would repeat its proposals
        sampler: optuna.samplers.BaseSampler
        if self.arguments.searcher == "random":
            sampler = optuna.samplers.RandomSampler(seed=seed)
        else:
            sampler = optuna.samplers.TPESampler(seed=seed)
        proposal: Any = Proposal(self.space, with_seed)
        return OptunaSearch(
            proposal, metric=VALUE, mode="min", sampler=sampler, storage=storage, study_name=STUDY
        )

    def _as_optuna_trial(self, trial: Trial) -> optuna.trial.FrozenTrial:
        """A trial that has ended; one that was stopped early has its last value, as OptunaSearch reports it."""
        params = {key: value for key, value in trial.changes.items() if key in self.space.domains}
        value = trial.bits_per_dim
        has_failed = trial.status == "failed" or not math.isfinite(value)
        return create_trial(
            state=TrialState.FAIL if has_failed else TrialState.COMPLETE,
            params=params,
            distributions={key: self.space.domains[key] for key in params},
            value=None if has_failed else value,
        )

    def _scheduler(self, ended: Sequence[Trial]) -> TrialScheduler:
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
            known: Any = SimpleNamespace(trial_id=trial.name)
            scheduler.on_trial_add(None, known)  # type: ignore[arg-type]
            for evaluation in trial.rungs:
                scheduler.on_trial_result(None, known, result(evaluation))  # type: ignore[arg-type]
        return scheduler

    def _tune(
        self,
        search: OptunaSearch,
        scheduler: TrialScheduler,
        num_samples: int,
        repeats: Callable[[Mapping[str, Any]], str | None] = lambda changes: None,
    ) -> None:
        # A trial's error is in its folder, in one line.
        level = logging.INFO if self.spec.verbose else logging.CRITICAL
        logging.getLogger("ray.tune").setLevel(level)
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        # The new output prints a box at any verbosity (Ray 2.60).
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        kind: Any = GroupTrial if self.has_groups else train_trial
        trainable = tune.with_resources(tune.with_parameters(kind, spec=self.spec), self.reserved)
        outcomes = Outcomes(
            trials=self.trials,
            spec=self.spec,
            publisher=self.publisher,
            interruption=self.interruption,
            news=self.news,
            tick=self.tick,
            repeats=repeats,
        )
        with tempfile.TemporaryDirectory(prefix="ddpm-ray-tune-") as folder:
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=scheduler,
                    num_samples=num_samples,
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
