"""A search killed at any point resumes as if it had not been killed: real Optuna and ASHA, fake trials."""

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from space import DEFAULT

from ddpm.presets import DIGITS
from ddpm.search import proposers, space, study, trial_manager
from ddpm.search.event_log import EventLog, Rung
from ddpm.search.trial_manager import TrialManager
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

    def add(self, event: str, trial: int, **what: Any) -> dict[str, Any]:
        made = super().add(event, trial, **what)
        if len(self.events) >= self.max_events:
            raise DriverKilled
        return made


def bits_per_dim_of(changes: dict[str, Any], images_seen: int) -> float:
    """Made-up bits/dim of a trial: lower the nearer its learning rate is to 2e-3, and lower with cosine."""
    far = abs(math.log(changes["optim.lr"] / 2e-3))
    return 2 + far + 0.5 * (changes["schedule.kind"] != "cosine") + 30 / images_seen


def search(
    folder: Path,
    searcher: str = "optuna",
    scheduler: str = "asha",
    max_events: float = math.inf,
    num_trials: int = NUM_TRIALS,
    proposer: Any = None,
) -> EventLog:
    """Run trials one after the other, as Tune would, until all are done or the event log kills the search."""
    found = space.parse(DEFAULT, DIGITS)
    events = DyingEventLog(locations.resolve(str(folder)), {}, timeout_s=0)
    events.max_events = max_events
    if proposer is None and searcher == "optuna":
        proposer = proposers.OptunaProposer(found, 3)
    elif proposer is None:
        proposer = proposers.ListProposer(found, 3, 2 if searcher == "grid" else None)
    stopper = study.Asha(RUNGS, 3) if scheduler == "asha" else study.NeverStop()
    trials = TrialManager(events, proposer, stopper, "bits_per_dim", num_trials, RUNGS[-1], lambda line: None)
    while (begun := trials.next()) is not None:
        number, changes = begun
        if number == 4:
            trials.failed(number, "it broke")
            continue
        for images_seen in RUNGS:  # including rungs that were evaluated before the kill
            if images_seen == RUNGS[-1]:
                trials.trained(number, 0.0)  # the next trial begins before the result
            rung = Rung(images_seen, bits_per_dim_of(changes, images_seen), 0.01, 0.5, 0.5)
            if not trials.evaluated(number, rung):
                break
    return events


def without_times(events: EventLog) -> list[dict[str, Any]]:
    """All events without their durations."""
    return [{key: value for key, value in event.items() if key != "wall_s"} for event in events.events]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return without_times(search(tmp_path_factory.mktemp("undisturbed")))


def test_a_search_killed_after_any_event_ends_the_same(
    tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    kill_points = range(1, len(undisturbed), 5)
    for cut in kill_points:
        folder = tmp_path / str(cut)
        with pytest.raises(DriverKilled):
            search(folder, max_events=cut)
        assert without_times(search(folder)) == undisturbed, f"cut after {cut} events"
    assert len(kill_points) > 8


def test_the_search_proposes_near_good_trials_and_stops_bad_ones(undisturbed: list[dict[str, Any]]) -> None:
    begun = [event for event in undisturbed if event["event"] == "begun"]
    status = {event["trial"]: event["status"] for event in undisturbed if event["event"] == "ended"}
    assert len(begun) == len(status) == NUM_TRIALS
    assert set(status.values()) == {"finished", "stopped", "failed"} and status[4] == "failed"

    def mean(events: list[dict[str, Any]]) -> float:
        return sum(bits_per_dim_of(event["changes"], RUNGS[-1]) for event in events) / len(events)

    assert mean(begun[10:]) < mean(begun[:10])  # TPE begins with ten random trials
    for at in RUNGS[
        :-1
    ]:  # ASHA: a trial continues if it is in the best third of those seen at that rung so far
        seen: list[float] = []
        for event in undisturbed:
            if event.get("images_seen") == at:
                good = not seen or event["bits_per_dim"] <= np.percentile(seen, 100 / 3)
                assert event["goes_on"] == good, (at, event, seen)
                seen.append(event["bits_per_dim"])


def test_optuna_has_the_state_and_the_rungs_of_every_trial(tmp_path: Path) -> None:
    """Both while the search runs and when its events are replayed; then the next proposals are equal."""
    both = [proposers.OptunaProposer(space.parse(DEFAULT, DIGITS), 3) for _ in range(2)]
    trials, again = (search(tmp_path, proposer=proposer).trials() for proposer in both)
    assert trials == again
    assert {trial.status for trial in trials} == {"finished", "stopped", "failed"}
    states = {"finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}
    for proposer in both:
        for trial, told in zip(trials, proposer.study.trials, strict=True):
            assert (told.state.name, told.params) == (states[trial.status], trial.changes)
            assert told.intermediate_values == {rung.images_seen: rung.bits_per_dim for rung in trial.rungs}
            assert told.value == (trial.last.bits_per_dim if trial.last else None)
    assert both[0].suggest(NUM_TRIALS) == both[1].suggest(NUM_TRIALS)


def test_a_trial_that_failed_after_a_rung_has_no_value() -> None:
    proposer = proposers.OptunaProposer(space.parse(DEFAULT, DIGITS), 3)
    proposer.suggest(0)
    proposer.evaluated(0, 100, 2.5)
    proposer.ended(0, "failed", 2.5)
    (told,) = proposer.study.trials
    assert (told.state.name, told.value, told.intermediate_values) == ("FAIL", None, {100: 2.5})


@pytest.mark.parametrize("searcher", ["random", "grid"])
def test_random_and_grid_search_without_asha(tmp_path: Path, searcher: str) -> None:
    trials = search(tmp_path, searcher, "none").trials()
    assert len(trials) == NUM_TRIALS
    assert {trial.status for trial in trials} == {"finished", "failed"}
    expected = space.parse(DEFAULT, DIGITS)
    if searcher == "grid":
        assert [dict(trial.changes) for trial in trials] == expected.grid(2)[:NUM_TRIALS]
    else:
        assert trials[7].changes == expected.sample(3, 7)


def test_a_finished_search_can_be_extended(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    """The eighth proposal may differ: it is made with one result more than in an uninterrupted search."""
    first = search(tmp_path, num_trials=7).trials()
    assert [trial.changes for trial in first] == [
        event["changes"] for event in undisturbed if event["event"] == "begun"
    ][:7]
    more = search(tmp_path)
    assert len(more.trials()) == NUM_TRIALS and more.trials()[:7] == first
    assert without_times(search(tmp_path)) == without_times(more)  # nothing is left to do


def test_a_searcher_that_proposes_another_trial_on_resume_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DriverKilled):
        search(tmp_path, max_events=3)
    file = tmp_path / "search.json"
    file.write_text(file.read_text().replace('"optim.lr": 0.', '"optim.lr": 0.1'))
    with pytest.raises(UserError, match="proposes a different trial-000 than the event log holds"):
        search(tmp_path)


def test_the_slot_of_a_trained_trial_is_free_before_its_last_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial's time ends then too; the last trial, which no other follows, keeps its slot until its result."""
    now = [100.0]
    monkeypatch.setattr(trial_manager.time, "monotonic", lambda: now[0])
    events = EventLog(locations.resolve(str(tmp_path)), {}, timeout_s=0)
    proposer = proposers.ListProposer(space.parse(DEFAULT, DIGITS), 3, None)
    found = TrialManager(events, proposer, study.NeverStop(), "bits_per_dim", 2, 900, lambda line: None)
    scheduler = study.Scheduler(found)

    def report(own: int, number: int, **news: Any) -> str:
        trial: Any = SimpleNamespace(config={"number": own})
        return scheduler.on_trial_result(None, trial, {"number": number, **news})

    def rung(images_seen: int, training_s: float) -> Rung:
        return Rung(images_seen, 2.0, 0.01, 0.5, 0.5, training_s)

    assert found.next() is not None
    now[0] += 40
    assert report(0, 0, rung=rung(300, 35.0)) == "CONTINUE"
    now[0] += 60
    assert report(0, 0, training_s=90.0) == "STOP"
    assert [trial.status for trial in found.trials] == ["running", "running"]
    next_one = found.next()
    assert next_one is not None and next_one[0] == 1
    now[0] += 8
    assert report(1, 0, rung=rung(900, 90.0)) == "CONTINUE"  # another trial has the slot
    assert report(1, 1, rung=rung(300, 5.0)) == "CONTINUE"
    now[0] += 12
    assert report(1, 1, training_s=15.0) == "CONTINUE"
    now[0] += 8
    assert report(1, 1, rung=rung(900, 15.0)) == "STOP"
    assert report(1, 1, rung=rung(900, 15.0)) == "STOP"  # a repeated report changes nothing
    assert found.is_over and [trial.status for trial in found.trials] == ["finished", "finished"]
    assert list(events.shares()) == [(90.0, 100.0), (15.0, 20.0)]
    assert len([event for event in events.events if event["event"] == "judged"]) == 4


def test_a_lost_result_is_computed_again(tmp_path: Path) -> None:
    """As when the driver died that had the result, and no other trial was left."""
    events = EventLog(locations.resolve(str(tmp_path)), {}, timeout_s=0)
    proposer = proposers.ListProposer(space.parse(DEFAULT, DIGITS), 3, None)
    found = TrialManager(events, proposer, study.NeverStop(), "bits_per_dim", 2, 900, lambda line: None)
    for number in (0, 1):
        assert found.next() == (number, found.trials[number].changes)
        assert found.trained(number, 1.0) == (number == 0)
    assert not found.evaluated(1, Rung(900, 2.0, 0.01, 0.5, 0.5))
    assert not found.is_over
    found.recall()
    assert found.num_left == 1 and found.next() == (0, found.trials[0].changes)
    assert not found.trained(0, 0.0) and not found.evaluated(0, Rung(900, 2.0, 0.01, 0.5, 0.5))
    assert found.is_over


@pytest.mark.slow
def test_trials_are_interrupted_even_after_the_actor_restarts(ray_here: None) -> None:
    interruption = study.Interruption(lambda: True)
    interruption.on_step_begin(0, [])
    before = ray.get(interruption.state.next_run.remote(0))
    ray.kill(interruption.state, no_restart=False)
    while ray.get(interruption.state.next_run.remote(0)) == before:  # the old actor may still answer
        time.sleep(0.05)
    interruption.on_step_begin(1, [])
    assert run_state.STOP in ray.get(interruption.state.snapshot.remote())
