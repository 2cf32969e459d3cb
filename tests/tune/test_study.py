"""A search that is cut anywhere goes on as if it had not been: Optuna and ASHA themselves, trials of arithmetic."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import space
import study

from ddpm import storage
from ddpm.config import UserError
from ddpm.contest import Contest
from ddpm.presets import DIGITS
from ddpm.trials import Ledger, Rung

RUNGS = [100, 300, 900]
NUM_TRIALS = 16


class Cut(Exception):
    """The search's driver was killed."""


class MortalLedger(Ledger):
    """Ends the search once it holds so many events."""

    lives = math.inf

    def add(self, event: str, trial: int, **what: Any) -> dict[str, Any]:
        made = super().add(event, trial, **what)
        if len(self.events) >= self.lives:
            raise Cut
        return made


def bits_of(changes: dict[str, Any], images_seen: int) -> float:
    """What a trial comes to: the better the nearer its learning rate is to 2e-3, and cosine is better."""
    far = abs(math.log(changes["optim.lr"] / 2e-3))
    return 2 + far + 0.5 * (changes["schedule.kind"] != "cosine") + 30 / images_seen


def search(
    folder: Path,
    searcher: str = "optuna",
    scheduler: str = "asha",
    lives: float = math.inf,
    num_trials: int = NUM_TRIALS,
) -> Ledger:
    """Run trials one after the other, as Tune would, as long as the ledger lives."""
    found = space.parse([], DIGITS)
    ledger = MortalLedger(storage.resolve(str(folder)), {}, timeout_s=0)
    ledger.lives = lives
    proposer: Any = (
        study.OptunaProposer(found, 3)
        if searcher == "optuna"
        else study.ListProposer(found, 3, 2 if searcher == "grid" else None)
    )
    stopper = study.Asha(RUNGS, 3) if scheduler == "asha" else study.NobodyStops()
    contest = Contest(ledger, proposer, stopper, "bits_per_dim", num_trials, RUNGS[-1], lambda line: None)
    while (begun := contest.next()) is not None:
        number, changes = begun
        if number == 4:
            contest.failed(number, "it broke")
            continue
        for images_seen in RUNGS:  # also those that were judged in an earlier life
            if images_seen == RUNGS[-1]:
                contest.trained(number, 0.0)  # the next trial begins before the verdict
            rung = Rung(images_seen, bits_of(changes, images_seen), 0.01, 0.5, 0.5)
            if not contest.judged(number, rung):
                break
    return ledger


def told(ledger: Ledger) -> list[dict[str, Any]]:
    """All events, without how long they took."""
    return [{key: value for key, value in event.items() if key != "wall_s"} for event in ledger.events]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told(search(tmp_path_factory.mktemp("undisturbed")))


def test_cut_after_any_event_it_ends_the_same(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    cuts = range(1, len(undisturbed), 5)
    for cut in cuts:
        folder = tmp_path / str(cut)
        with pytest.raises(Cut):
            search(folder, lives=cut)
        assert told(search(folder)) == undisturbed, f"cut after {cut} events"
    assert len(cuts) > 8


def test_it_looks_where_it_is_good_and_stops_what_is_not(undisturbed: list[dict[str, Any]]) -> None:
    begun = [event for event in undisturbed if event["event"] == "begun"]
    status = {event["trial"]: event["status"] for event in undisturbed if event["event"] == "ended"}
    assert len(begun) == len(status) == NUM_TRIALS
    assert set(status.values()) == {"finished", "stopped", "failed"} and status[4] == "failed"

    def mean(events: list[dict[str, Any]]) -> float:
        return sum(bits_of(event["changes"], RUNGS[-1]) for event in events) / len(events)

    assert mean(begun[10:]) < mean(begun[:10])  # TPE begins with ten random ones
    for at in RUNGS[:-1]:  # who goes on is in the better third of those seen at that rung so far
        seen: list[float] = []
        for event in undisturbed:
            if event.get("images_seen") == at:
                good = not seen or event["bits_per_dim"] <= np.percentile(seen, 100 / 3)
                assert event["goes_on"] == good, (at, event, seen)
                seen.append(event["bits_per_dim"])


@pytest.mark.parametrize("searcher", ["random", "grid"])
def test_without_optuna_and_without_asha(tmp_path: Path, searcher: str) -> None:
    trials = search(tmp_path, searcher, "none").trials()
    assert len(trials) == NUM_TRIALS
    assert {trial.status for trial in trials} == {"finished", "failed"}
    expected = space.parse([], DIGITS)
    if searcher == "grid":
        assert [dict(trial.changes) for trial in trials] == expected.grid(2)[:NUM_TRIALS]
    else:
        assert trials[7].changes == expected.sample(3, 7)


def test_more_trials_may_be_asked_for_later(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    assert len(search(tmp_path, num_trials=7).trials()) == 7
    assert told(search(tmp_path)) == undisturbed
    assert told(search(tmp_path)) == undisturbed  # nothing is left to do


def test_a_searcher_that_has_changed_its_mind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        search(tmp_path, lives=3)
    file = tmp_path / "search.json"
    file.write_text(file.read_text().replace('"optim.lr": 0.', '"optim.lr": 0.1'))
    with pytest.raises(UserError, match="proposes another trial-000 than the ledger has"):
        search(tmp_path)
