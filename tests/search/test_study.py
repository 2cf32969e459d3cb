"""A search killed at any point goes on: the real OptunaSearch, ASHA and callback, trials that are made up."""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from support import searches

from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.evaluation.rung import Evaluation, Rungs, file_name
from ddpm.runs import run_folder, storage
from ddpm.runs.run_folder import RunFolder, RunStatus, Search
from ddpm.search import space, trainables
from ddpm.search.config import Arguments
from ddpm.search.space import DEFAULT
from ddpm.search.study import NewTrials, Study
from ddpm.search.trainables import CHANGES, NAME, VALUE, Spec
from ddpm.search.trials import Trial, Trials
from ddpm.search.tune_callbacks import Outcomes
from ddpm.tracking.pusher import NoPusher
from ddpm.utils.errors import UserError

RUNGS = (128, 384, 1152)
NUM_TRIALS = 16
GRID = (
    "schedule.kind=linear|cosine",
    "schedule.beta_end=0.01|0.04",
    "schedule.num_timesteps=200|500|1000",
    "optim.lr=1e-4|1e-3",
)
"""A space of 18 points."""
SMALL = ("schedule.kind=cosine|linear", "optim.lr=1e-3|2e-3")
"""A space of 4 points."""
BROKEN = 4
"""The number of the trial that fails."""


@functools.cache
def space_of(flags: tuple[str, ...]) -> space.Space:
    """Cached: the check of a space builds a net for each of its corners."""
    return space.parse(flags, DIGITS)


class DriverKilled(Exception):
    """The search's driver was killed."""


def bits_per_dim_of(changes: dict[str, Any], images_seen: int) -> float:
    """Made-up bits/dim of a trial: lower the nearer its learning rate is to 2e-3, and lower with cosine."""
    far = abs(math.log(changes["optim.lr"] / 2e-3))
    seed = 0.01 * changes.get("train.seed", 0)
    return 2 + far + 0.5 * (changes.get("schedule.kind") != "cosine") + 30 / images_seen + seed


class SpecWithoutData(Spec):
    """A spec of trials that are made up, and read no data."""

    def open_run(self, proposal: Mapping[str, Any]) -> RunFolder:
        return run_folder.open_run(proposal[NAME], self.config.run.storage)


class Simulated(Study):
    """A study whose trials are made up; it counts the rungs that it trains, and is killed after `max_rungs`."""

    trained: Counter[tuple[str, int]]
    max_rungs = math.inf

    def _tune(self, search: Any, scheduler: Any, num_trials: int) -> None:
        """What Tune does, one trial after another."""
        outcomes = Outcomes(self.trials, self.spec, self.pusher, self.interruption, self.scoreboard)
        for number in range(num_trials):
            config = search.suggest(str(number))
            if config == Searcher.FINISHED:
                return
            trial: Any = SimpleNamespace(trial_id=str(number), config=config, last_result={})
            scheduler.on_trial_add(None, trial)
            outcomes.on_trial_start(0, [], trial)
            self._run_trial(trial, search, scheduler, outcomes)
            scheduler.on_trial_complete(None, trial, trial.last_result)
            search.on_trial_complete(trial.trial_id, trial.last_result)
            outcomes.on_trial_complete(0, [], trial)

    def _run_trial(self, trial: Any, search: Any, scheduler: Any, outcomes: Outcomes) -> None:
        name = trial.config[NAME]
        known = self.trials.get(name)
        assert known is not None and not known.has_ended
        for images_seen in self.spec.rungs.at:
            if known.number == BROKEN:
                trial.last_result = trainables.failure(UserError("it broke"))
                return
            bits = bits_per_dim_of(trial.config[CHANGES], images_seen)
            evaluation = Evaluation(images_seen, (bits, bits) * 10, 0.5, 0.5)
            file = self.trials.folder.child(name).child(file_name(images_seen))
            if not file.exists():
                self.trained[name, images_seen] += 1
                file.write(evaluation.to_json())
                if sum(self.trained.values()) >= self.max_rungs:
                    raise DriverKilled
            trial.last_result = trainables.result(evaluation)
            search.on_trial_result(trial.trial_id, trial.last_result)
            outcomes.on_trial_result(0, [], trial, trial.last_result)
            if scheduler.on_trial_result(None, trial, trial.last_result) == TrialScheduler.STOP:
                return


def search(
    folder: Path,
    flags: tuple[str, ...] = DEFAULT,
    max_rungs: float = math.inf,
    rungs: tuple[int, ...] = RUNGS,
    **chosen: Any,
) -> Simulated:
    """Run a search, or go on with it, until all of its trials have ended or it is killed."""
    config = override(DIGITS, {"run.storage": str(folder), "train.total_images": RUNGS[-1]})
    evaluator: Any = None
    silent: Any = SimpleNamespace(is_on=False, news=lambda line: None, tick=lambda: None)
    chosen = {"num_trials": NUM_TRIALS, "finalists": 0, "seed": 2, **chosen}
    found = Simulated(
        arguments=replace(Arguments("digits", config), **chosen),
        space=space_of(flags),
        spec=SpecWithoutData(config, "digits", DIGITS, Rungs(rungs, evaluator), Search("s", "k"), False),
        trials=searches.begin(storage.resolve(str(folder))),
        pusher=NoPusher(),
        reserved={},
        has_groups=False,
        interruption=silent,
        scoreboard=silent,
    )
    found.trained = Counter()
    found.max_rungs = max_rungs
    found.run()
    return found


def outcomes(trials: list[Trial]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Status and rungs of each trial."""
    return {trial.name: (trial.status, tuple(rung.images_seen for rung in trial.rungs)) for trial in trials}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    return search(tmp_path_factory.mktemp("undisturbed")).trials.all()


@pytest.mark.lowest
def test_the_search_proposes_near_good_trials_and_stops_bad_ones(undisturbed: list[Trial]) -> None:
    status = Counter(trial.status for trial in undisturbed)
    assert len(undisturbed) == NUM_TRIALS and status[RunStatus.RUNNING] == 0
    assert status[RunStatus.FINISHED] > 1 and status[RunStatus.PRUNED] > 5 and status[RunStatus.FAILED] == 1
    assert undisturbed[BROKEN].reason == "it broke"

    def mean(trials: list[Trial]) -> float:
        return sum(bits_per_dim_of(trial.changes, RUNGS[-1]) for trial in trials) / len(trials)

    assert mean(undisturbed[10:]) < mean(undisturbed[:10])  # TPE begins with ten random trials


def test_trials_are_named_by_what_they_vary(undisturbed: list[Trial], tmp_path: Path) -> None:
    (first, *_) = undisturbed
    names = {trial.name for trial in undisturbed}
    assert len(names) == NUM_TRIALS and all(name.startswith("digits-") for name in names)
    again = search(tmp_path, num_trials=1).trials.all()
    assert [(trial.name, trial.changes) for trial in again] == [(first.name, first.changes)]


def test_a_grid_killed_after_any_rung_ends_the_same(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", GRID, searcher="grid")
    expected = outcomes(whole.trials.all())
    total = sum(whole.trained.values())
    assert len(expected) == NUM_TRIALS and set(whole.trained.values()) == {1}
    for cut in (1, 4, total // 2):
        folder = tmp_path / str(cut)
        killed = True
        while killed:
            try:
                last = search(folder, GRID, searcher="grid", max_rungs=cut)
                killed = False
            except DriverKilled:
                pass
        assert outcomes(last.trials.all()) == expected, f"killed after each {cut} rungs"


def test_tpe_killed_after_any_rung_trains_no_trial_twice(tmp_path: Path) -> None:
    for cut in (2, 7, 12):
        folder = tmp_path / str(cut)
        with pytest.raises(DriverKilled):
            search(folder, max_rungs=cut)
        before = Trials(storage.resolve(str(folder))).all()
        ended = {trial.name for trial in before if trial.has_ended}
        found = search(folder)
        assert len(found.trials.all()) == NUM_TRIALS
        assert all(trial.has_ended for trial in found.trials.all())
        assert ended.isdisjoint(name for name, _ in found.trained)
        assert set(found.trained.values()) == {1}
        assert search(folder).trained == Counter()  # nothing is left to do


def test_what_has_ended_is_told_to_optuna_and_asha(undisturbed: list[Trial], tmp_path: Path) -> None:
    found = search(tmp_path)
    ended = found.trials.all()
    study: Any = found._new_trials([], ended)._optuna._ot_study
    for trial, told in zip(ended, study.trials, strict=True):
        assert told.params == trial.changes
        has_failed = trial.status == RunStatus.FAILED
        assert told.state.name == ("FAIL" if has_failed else "COMPLETE")
        assert told.value == (None if has_failed else trial.bits_per_dim)
    scheduler: Any = found._asha(ended)
    bad: Any = SimpleNamespace(trial_id="bad")
    scheduler.on_trial_add(None, bad)
    assert scheduler.on_trial_result(None, bad, {"images_seen": 128, "value": 99.0}) == TrialScheduler.STOP
    good: Any = SimpleNamespace(trial_id="good")
    scheduler.on_trial_add(None, good)
    assert (
        scheduler.on_trial_result(None, good, {"images_seen": 128, "value": 0.0}) == TrialScheduler.CONTINUE
    )


def test_an_equal_proposal_is_not_trained_again(tmp_path: Path) -> None:
    """The search goes on until it has tried all points."""
    found = search(tmp_path, SMALL, num_trials=12)
    assert len(found.trials.all()) == 4 and set(found.trained.values()) == {1}
    assert all(trial.has_ended for trial in found.trials.all())
    assert search(tmp_path, SMALL, num_trials=12).trained == Counter()


def test_optuna_is_told_the_last_value_of_a_point_that_it_proposes_again(tmp_path: Path) -> None:
    """Not before its trial has ended; until then there is no proposal."""
    study: Any = search(tmp_path, SMALL, num_trials=0)
    new: NewTrials = study._new_trials([{"schedule.kind": "cosine", "optim.lr": 1e-3}] * 2, [])
    told = new._optuna._ot_study
    first = new.suggest("a")
    assert [new.suggest("b"), new.suggest("c")] == [None, None]
    assert [trial.state.name for trial in told.trials] == ["RUNNING", "RUNNING"]
    new.on_trial_complete("a", {VALUE: 2.5})
    second = new.suggest("d")
    assert second[NAME] != first[NAME]
    assert [trial.value for trial in told.trials[:2]] == [2.5, 2.5]
    assert "PRUNED" not in {trial.state.name for trial in told.trials}


def test_a_point_whose_trial_has_failed_is_a_failure_again(tmp_path: Path) -> None:
    study: Any = search(tmp_path, SMALL, num_trials=0)
    new: NewTrials = study._new_trials([{"schedule.kind": "cosine", "optim.lr": 1e-3}] * 2, [])
    new.suggest("a")
    new.on_trial_complete("a", trainables.failure(UserError("it broke")))
    assert new.suggest("b") != Searcher.FINISHED
    assert [trial.state.name for trial in new._optuna._ot_study.trials[:2]] == ["FAIL", "FAIL"]


@pytest.mark.parametrize("searcher", ["random", "grid"])
def test_random_and_grid_search_without_asha(tmp_path: Path, searcher: Any) -> None:
    flags = GRID if searcher == "grid" else DEFAULT
    found = search(tmp_path, flags, searcher=searcher, rungs=RUNGS[-1:]).trials.all()
    assert Counter(trial.status for trial in found) == {
        RunStatus.FINISHED: NUM_TRIALS - 1,
        RunStatus.FAILED: 1,
    }
    if searcher == "grid":
        assert [trial.changes for trial in found] == space_of(GRID).grid(NUM_TRIALS)


def test_a_finished_search_can_be_extended(tmp_path: Path) -> None:
    first = search(tmp_path, num_trials=7).trials.all()
    more = search(tmp_path)
    assert more.trials.all()[:7] == first and len(more.trials.all()) == NUM_TRIALS
    assert {name for name, _ in more.trained}.isdisjoint(trial.name for trial in first)


def test_finalists_are_trained_again_with_other_seeds(tmp_path: Path) -> None:
    """Also if the search is killed meanwhile; they run to the end."""
    own = search(tmp_path, finalists=2).trials.all()
    best = sorted((t for t in own if t.status == RunStatus.FINISHED), key=lambda t: t.bits_per_dim)[:2]
    with pytest.raises(DriverKilled):
        search(tmp_path, finalists=2, finalist_seeds=3, max_rungs=4)
    found = search(tmp_path, finalists=2, finalist_seeds=3).trials.all()
    again = found[len(own) :]
    assert found[: len(own)] == own
    assert {(t.repeats, t.changes["train.seed"]) for t in again} == {
        (b.name, s) for b in best for s in (1, 2)
    }
    assert {(t.status, len(t.rungs)) for t in again} == {(RunStatus.FINISHED, 3)}
