"""A search killed at any point goes on: the real OptunaSearch, ASHA and callback, trials that are made up."""

import functools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.evaluation.rung import Evaluation, Rungs, file_name
from ddpm.runs import storage
from ddpm.runs.run_folder import Search
from ddpm.search import space, trainables
from ddpm.search.config import Arguments
from ddpm.search.default_space import DEFAULT
from ddpm.search.study import Study
from ddpm.search.trainables import Spec
from ddpm.search.trials import Trial, Trials
from ddpm.search.tune_callbacks import Outcomes
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


class Simulated(Study):
    """A study whose trials are made up; it counts the rungs that it trains, and is killed after `max_rungs`."""

    trained: Counter[tuple[str, int]]
    max_rungs = math.inf

    def _tune(
        self, search: Any, scheduler: Any, num_samples: int, repeats: Any = lambda changes: None
    ) -> None:
        """What Tune does, one trial after another."""
        outcomes = Outcomes(
            trials=self.trials,
            spec=self.spec,
            publisher=self.publisher,
            interruption=self.interruption,
            news=self.news,
            tick=self.tick,
            repeats=repeats,
        )
        for number in range(num_samples):
            config = search.suggest(str(number))
            trial: Any = SimpleNamespace(trial_id=str(number), config=config, last_result={})
            scheduler.on_trial_add(None, trial)
            outcomes.on_trial_start(0, [], trial)
            self._run_trial(trial, search, scheduler, outcomes)
            scheduler.on_trial_complete(None, trial, trial.last_result)
            search.on_trial_complete(trial.trial_id, trial.last_result)
            outcomes.on_trial_complete(0, [], trial)

    def _run_trial(self, trial: Any, search: Any, scheduler: Any, outcomes: Outcomes) -> None:
        name = str(self.spec.configured(trial.config).run.name)
        known = self.trials.get(name)
        assert known is not None
        for iteration, images_seen in enumerate(self.spec.rungs.at, 1):
            if known.status == "failed" or known.number == BROKEN:
                trial.last_result = {
                    "training_iteration": iteration,
                    **trainables.failure(UserError("it broke")),
                }
                return
            file = self.trials.folder.child(name).child(file_name(images_seen))
            if not file.exists():
                if known.status != "running":
                    return  # an equal proposal of a trial that was stopped
                self.trained[name, images_seen] += 1
                bits = bits_per_dim_of(trial.config, images_seen)
                file.write(Evaluation(images_seen, (bits, bits) * 10, 0.5, 0.5).to_json())
                if sum(self.trained.values()) >= self.max_rungs:
                    raise DriverKilled
            found = {"training_iteration": iteration, "images_seen": images_seen}
            trial.last_result = {**found, "value": bits_per_dim_of(trial.config, images_seen)}
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
    place = storage.resolve(str(folder))
    config = override(DIGITS, {"run.storage": str(folder), "train.total_images": RUNGS[-1]})
    evaluator: Any = None
    silent: Any = SimpleNamespace(notify=lambda name: None, is_on=False)
    chosen = {"num_trials": NUM_TRIALS, "finalists": 0, "seed": 2, **chosen}
    found = Simulated(
        arguments=replace(Arguments("digits", config), **chosen),
        space=space_of(flags),
        spec=Spec(config, "digits", DIGITS, Rungs(rungs, evaluator), Search("s", "k"), False),
        trials=Trials(place, {}),
        publisher=silent,
        reserved={},
        has_groups=False,
        interruption=silent,
        news=lambda line: None,
        tick=lambda: None,
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


def test_the_search_proposes_near_good_trials_and_stops_bad_ones(undisturbed: list[Trial]) -> None:
    status = Counter(trial.status for trial in undisturbed)
    assert len(undisturbed) == NUM_TRIALS and status["running"] == 0
    assert status["finished"] > 1 and status["stopped"] > 5 and status["failed"] == 1
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
        before = Trials(storage.resolve(str(folder)), {}).all()
        ended = {trial.name for trial in before if trial.status != "running"}
        found = search(folder)
        assert len(found.trials.all()) == NUM_TRIALS
        assert {trial.status for trial in found.trials.all()} == {"finished", "stopped", "failed"}
        assert ended.isdisjoint(name for name, _ in found.trained)
        assert set(found.trained.values()) == {1}
        assert search(folder).trained == Counter()  # nothing is left to do


def test_what_has_ended_is_told_to_optuna_and_asha(undisturbed: list[Trial], tmp_path: Path) -> None:
    found = search(tmp_path)
    ended = found.trials.all()
    study: Any = found._search([], ended)._ot_study
    for trial, told in zip(ended, study.trials, strict=True):
        assert told.params == trial.changes
        assert told.state.name == ("FAIL" if trial.status == "failed" else "COMPLETE")
        assert told.value == (None if trial.status == "failed" else trial.bits_per_dim)
    scheduler: Any = found._scheduler(ended)
    bad: Any = SimpleNamespace(trial_id="bad")
    scheduler.on_trial_add(None, bad)
    assert scheduler.on_trial_result(None, bad, {"images_seen": 128, "value": 99.0}) == TrialScheduler.STOP
    good: Any = SimpleNamespace(trial_id="good")
    scheduler.on_trial_add(None, good)
    assert (
        scheduler.on_trial_result(None, good, {"images_seen": 128, "value": 0.0}) == TrialScheduler.CONTINUE
    )


def test_an_equal_proposal_is_not_trained_again(tmp_path: Path) -> None:
    found = search(tmp_path, ("schedule.kind=cosine|linear", "optim.lr=1e-3|2e-3"), num_trials=12)
    assert len(found.trials.all()) <= 4 and set(found.trained.values()) == {1}
    assert {trial.status for trial in found.trials.all()} <= {"finished", "stopped"}


@pytest.mark.parametrize("searcher", ["random", "grid"])
def test_random_and_grid_search_without_asha(tmp_path: Path, searcher: Any) -> None:
    flags = GRID if searcher == "grid" else DEFAULT
    found = search(tmp_path, flags, searcher=searcher, rungs=RUNGS[-1:]).trials.all()
    assert Counter(trial.status for trial in found) == {"finished": NUM_TRIALS - 1, "failed": 1}
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
    best = sorted((t for t in own if t.status == "finished"), key=lambda t: t.bits_per_dim)[:2]
    with pytest.raises(DriverKilled):
        search(tmp_path, finalists=2, finalist_seeds=3, max_rungs=4)
    found = search(tmp_path, finalists=2, finalist_seeds=3).trials.all()
    again = found[len(own) :]
    assert found[: len(own)] == own
    assert {(t.repeats, t.changes["train.seed"]) for t in again} == {
        (b.name, s) for b in best for s in (1, 2)
    }
    assert {(t.status, len(t.rungs)) for t in again} == {("finished", 3)}
