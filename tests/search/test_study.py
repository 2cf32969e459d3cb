"""A search killed at any point resumes as if it had not been killed: real Optuna and ASHA, fake trials."""

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from ddpm.presets import DIGITS
from ddpm.search import space, study, trial_manager
from ddpm.search.default_space import DEFAULT
from ddpm.search.event_log import Begun, Ended, Evaluated, Event, EventLog, Rung, best
from ddpm.search.runner import News, Trained
from ddpm.search.trial_manager import OptunaProposer, TrialManager
from ddpm.storage import locations
from ddpm.training import run_state
from ddpm.utils.errors import UserError

RUNGS = [100, 300, 900]
NUM_TRIALS = 16


class DriverKilled(Exception):
    """The search's driver was killed."""


class DyingEventLog(EventLog):
    """An event log that kills the search once it holds `max_events` events."""

    max_events = math.inf

    def add(self, event: Event) -> None:
        super().add(event)
        if len(self.events) >= self.max_events:
            raise DriverKilled


def bits_per_dim_of(changes: dict[str, Any], images_seen: int) -> float:
    """Made-up bits/dim of a trial: lower the nearer its learning rate is to 2e-3, and lower with cosine."""
    far = abs(math.log(changes["optim.lr"] / 2e-3))
    return 2 + far + 0.5 * (changes["schedule.kind"] != "cosine") + 30 / images_seen


def random_trials(folder: Path, num_trials: int) -> TrialManager:
    """The manager of a new random search."""
    events = EventLog(locations.resolve(str(folder)), {}, timeout_s=0)
    proposer = OptunaProposer(space.parse(DEFAULT, DIGITS), 3, "random")
    return TrialManager(events, proposer, "bits_per_dim", num_trials, 900, 3, lambda line: None)


def search(
    folder: Path,
    searcher: Any = "optuna",
    scheduler: str = "asha",
    max_events: float = math.inf,
    num_trials: int = NUM_TRIALS,
    proposer: Any = None,
    finalists: int = 0,
) -> EventLog:
    """Run trials one after the other, as Tune would, until all are done or the event log kills the search."""
    found = space.parse(DEFAULT, DIGITS)
    events = DyingEventLog(locations.resolve(str(folder)), {}, timeout_s=0)
    events.max_events = max_events
    proposer = proposer or OptunaProposer(found, 3, searcher, 2)
    trials = TrialManager(events, proposer, "bits_per_dim", num_trials, RUNGS[-1], 3, lambda line: None)
    trials.finalists, trials.seeds = finalists, (1, 2)
    rungs = RUNGS if scheduler == "asha" else RUNGS[-1:]
    begun = trials.next()
    while begun is not None:
        number, changes = begun
        begun = None
        for images_seen in rungs:  # including rungs that were evaluated before the kill
            if number == 4 or (number == 0 and images_seen > RUNGS[0]):
                trials.failed(number, "it broke")
                break
            if images_seen == RUNGS[-1] and trials.trained(number, 0.0):
                begun = trials.next()  # before the result
            rung = Rung(images_seen, bits_per_dim_of(changes, images_seen), 0.01, 0.5, 0.5)
            if not trials.evaluated(number, rung):
                break
        begun = begun or trials.next()
    return events


def without_times(events: EventLog) -> list[Event]:
    """All events without their durations."""
    return [replace(event, wall_s=0.0) if isinstance(event, Ended) else event for event in events.events]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    return without_times(search(tmp_path_factory.mktemp("undisturbed")))


def test_a_search_killed_after_any_event_ends_the_same(tmp_path: Path, undisturbed: list[Event]) -> None:
    kill_points = range(1, len(undisturbed), 5)
    for cut in kill_points:
        folder = tmp_path / str(cut)
        with pytest.raises(DriverKilled):
            search(folder, max_events=cut)
        assert without_times(search(folder)) == undisturbed, f"cut after {cut} events"
    assert len(kill_points) > 8


def test_the_search_proposes_near_good_trials_and_stops_bad_ones(undisturbed: list[Event]) -> None:
    begun = [event for event in undisturbed if isinstance(event, Begun)]
    status = {event.trial: event.status for event in undisturbed if isinstance(event, Ended)}
    assert len(begun) == len(status) == NUM_TRIALS
    assert set(status.values()) == {"finished", "stopped", "failed"} and status[0] == status[4] == "failed"

    def mean(events: list[Begun]) -> float:
        return sum(bits_per_dim_of(event.changes, RUNGS[-1]) for event in events) / len(events)

    assert mean(begun[10:]) < mean(begun[:10])  # TPE begins with ten random trials


def test_trials_are_stopped_as_by_the_asha_of_ray_tune(undisturbed: list[Event]) -> None:
    asha = AsyncHyperBandScheduler("images_seen", "value", "min", RUNGS[-1], RUNGS[0], reduction_factor=3)
    known, answers = dict[int, Any](), list[bool]()
    for event in undisturbed:
        if isinstance(event, Evaluated) and event.rung.images_seen < RUNGS[-1]:
            if event.trial not in known:
                known[event.trial] = SimpleNamespace(trial_id=str(event.trial))
                asha.on_trial_add(None, known[event.trial])
            result = {"images_seen": event.rung.images_seen, "value": event.rung.bits_per_dim}
            decision = asha.on_trial_result(None, known[event.trial], result)
            assert event.should_continue == (decision == TrialScheduler.CONTINUE), event
            answers.append(event.should_continue)
    assert 3 < sum(answers) < len(answers) - 3


def test_optuna_has_the_state_and_the_rungs_of_every_trial(tmp_path: Path) -> None:
    """Both while the search runs and when its events are replayed; then the next proposals are equal."""
    both = [OptunaProposer(space.parse(DEFAULT, DIGITS), 3) for _ in range(2)]
    trials, again = (search(tmp_path, proposer=proposer).trials() for proposer in both)
    assert trials == again
    assert {trial.status for trial in trials} == {"finished", "stopped", "failed"}
    states = {"finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}
    for proposer in both:
        for trial, told in zip(trials, proposer.study.trials, strict=True):
            assert (told.state.name, told.params) == (states[trial.status], trial.changes)
            assert told.intermediate_values == {rung.images_seen: rung.bits_per_dim for rung in trial.rungs}
            has_value = trial.last and trial.status != "failed"
            assert told.value == (trial.last.bits_per_dim if has_value else None)
    assert both[0].suggest(NUM_TRIALS) == both[1].suggest(NUM_TRIALS)


def test_finalists_are_trained_again_whenever_the_search_is_killed(
    tmp_path: Path, undisturbed: list[Event]
) -> None:
    """They run to the end, and neither Optuna nor ASHA knows of them."""
    whole = search(tmp_path / "whole", finalists=2)
    assert without_times(whole)[: len(undisturbed)] == undisturbed
    own, again = whole.trials()[:NUM_TRIALS], whole.trials()[NUM_TRIALS:]
    first, second = (trial.number for trial in best(own, "bits_per_dim")[:2])
    expected = [(number, seed) for seed in (1, 2) for number in (first, second)]
    assert [(trial.repeats, trial.changes["train.seed"]) for trial in again] == expected
    assert all(trial.changes == {**own[trial.repeats or 0].changes, **trial.changes} for trial in again)
    assert {(trial.status, len(trial.rungs)) for trial in again} == {("finished", 3)}
    for cut in range(len(undisturbed), len(whole.events), 4):
        with pytest.raises(DriverKilled):
            search(tmp_path / str(cut), max_events=cut, finalists=2)
        assert without_times(search(tmp_path / str(cut), finalists=2)) == without_times(whole), cut
    more = search(tmp_path / "whole", num_trials=NUM_TRIALS + 2, finalists=2).trials()
    assert [trial.repeats is None for trial in more[NUM_TRIALS + 4 :]][:2] == [True, True]


@pytest.mark.parametrize("searcher", ["random", "grid"])
def test_random_and_grid_search_without_asha(tmp_path: Path, searcher: Any) -> None:
    with pytest.raises(DriverKilled):
        search(tmp_path, searcher, "none", max_events=20)
    trials = search(tmp_path, searcher, "none").trials()
    assert len(trials) == NUM_TRIALS
    assert {trial.status for trial in trials} == {"finished", "failed"}
    if searcher == "grid":
        expected = space.parse(DEFAULT, DIGITS).grid(2)[:NUM_TRIALS]
    else:
        proposer = OptunaProposer(space.parse(DEFAULT, DIGITS), 3, searcher)
        expected = [proposer.suggest(number) for number in range(NUM_TRIALS)]
    assert [trial.changes for trial in trials] == expected


def test_a_finished_search_can_be_extended(tmp_path: Path, undisturbed: list[Event]) -> None:
    """The eighth proposal may differ: it is made with one result more than in an uninterrupted search."""
    first = search(tmp_path, num_trials=7).trials()
    assert [trial.changes for trial in first] == [
        event.changes for event in undisturbed if isinstance(event, Begun)
    ][:7]
    more = search(tmp_path)
    assert len(more.trials()) == NUM_TRIALS and more.trials()[:7] == first
    assert without_times(search(tmp_path)) == without_times(more)  # nothing is left to do


def test_a_searcher_that_proposes_another_trial_on_resume_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DriverKilled):
        search(tmp_path, max_events=3)
    file = tmp_path / "search.json"
    file.write_text(file.read_text().replace('"optim.lr": 0.', '"optim.lr": 0.1'))
    with pytest.raises(UserError, match=r"trial-000.*--name"):
        search(tmp_path)


def test_the_slot_of_a_trained_trial_is_free_before_its_last_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial's time ends then too; the last trial, which no other follows, keeps its slot until its result."""
    now = [100.0]
    monkeypatch.setattr(trial_manager.time, "monotonic", lambda: now[0])
    found = random_trials(tmp_path, 2)
    scheduler = study.Scheduler(found)

    def report(own: int, number: int, news: News) -> str:
        trial: Any = SimpleNamespace(config={"number": own})
        return scheduler.on_trial_result(None, trial, {"number": number, "news": news})

    def rung(images_seen: int, training_s: float) -> Rung:
        return Rung(images_seen, 2.0, 0.01, 0.5, 0.5, training_s)

    assert found.next() is not None
    now[0] += 40
    assert report(0, 0, rung(300, 35.0)) == "CONTINUE"
    now[0] += 60
    assert report(0, 0, Trained(90.0)) == "STOP"
    next_one = found.next()
    assert next_one is not None and next_one[0] == 1
    assert [trial.status for trial in found.trials] == ["running", "running"]
    now[0] += 8
    assert report(1, 0, rung(900, 90.0)) == "CONTINUE"  # another trial has the slot
    assert report(1, 1, rung(300, 5.0)) == "CONTINUE"
    now[0] += 12
    assert report(1, 1, Trained(15.0)) == "CONTINUE"
    now[0] += 8
    assert report(1, 1, rung(900, 15.0)) == "STOP"
    assert report(1, 1, rung(900, 15.0)) == "STOP"  # a repeated report changes nothing
    assert found.is_over and [trial.status for trial in found.trials] == ["finished", "finished"]
    events = EventLog.existing(locations.resolve(str(tmp_path))).events
    ended = [event for event in events if isinstance(event, Ended)]
    assert [(event.training_s, event.wall_s) for event in ended] == [(90.0, 100.0), (15.0, 20.0)]
    assert len([event for event in events if isinstance(event, Evaluated)]) == 4


def test_a_lost_result_is_computed_again(tmp_path: Path) -> None:
    """As when the driver died that had the result, and no other trial was left."""
    found = random_trials(tmp_path, 2)
    for number in (0, 1):
        assert found.next() == (number, found.trials[number].changes)
        assert found.trained(number, 1.0) == (number == 0)
    assert not found.evaluated(1, Rung(900, 2.0, 0.01, 0.5, 0.5))
    assert not found.is_over
    found.recall()
    assert found.num_left == 1 and found.next() == (0, found.trials[0].changes)
    assert not found.trained(0, 0.0) and not found.evaluated(0, Rung(900, 2.0, 0.01, 0.5, 0.5))
    assert found.is_over


def test_a_trial_whose_process_died_too_often_has_failed(tmp_path: Path) -> None:
    trials = random_trials(tmp_path, 1)
    interruption: Any = SimpleNamespace(is_on=False)
    starter = study.Starter(trials, interruption)
    assert starter.suggest("a")["number"] == 0
    starter.on_trial_complete("a", error=True)
    assert (trials.trials[0].status, trials.trials[0].reason) == (
        "failed",
        "its process died more than 3 times",
    )
    assert trials.is_over and starter.suggest("b") == study.Searcher.FINISHED


@pytest.mark.slow
def test_trials_are_interrupted_even_after_the_actor_restarts(ray_here: None) -> None:
    interruption = study.Interruption(lambda: True)
    interruption.on_step_begin(0, [])
    assert run_state.STOP in ray.get(interruption.state.snapshot.remote())
    ray.kill(interruption.state, no_restart=False)
    while run_state.STOP in ray.get(interruption.state.snapshot.remote()):  # the old actor may still answer
        time.sleep(0.05)
    interruption.on_step_begin(1, [])
    assert run_state.STOP in ray.get(interruption.state.snapshot.remote())
