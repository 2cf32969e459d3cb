"""The event log of a search: it survives a reload, and rejects another search's or a damaged file."""

import json
from pathlib import Path
from typing import Any

import pytest

from ddpm.evaluation.scores import Score
from ddpm.search.event_log import Begun, Ended, Evaluated, EventLog, Rung, Scored, Trial, best, rungs
from ddpm.storage import locations
from ddpm.utils.errors import UserError

SETTINGS = {"metric": "bits_per_dim", "space": {"optim.lr": [1e-4, 1e-2]}, "seed": 0}


def open_events(folder: Path, **changes: Any) -> EventLog:
    return EventLog(locations.resolve(str(folder)), SETTINGS | changes, timeout_s=0)


def test_events_survive_a_reload(tmp_path: Path) -> None:
    first = open_events(tmp_path)
    for number in range(3):
        first.add(
            Begun(number, {"optim.lr": 0.1 + 0.2}, 0 if number == 2 else None)
        )  # a float of many digits
    first.add(Evaluated(0, Rung(64, 2.5, 0.1, 0.5, 0.4, 9.0), True))
    first.add(Evaluated(0, Rung(128, 2.25, 0.1, 0.5, 0.4, 9.0), False))
    first.add(Ended(0, "finished", "", wall_s=20.0, training_s=9.0))
    first.add(Ended(1, "failed", "it broke", wall_s=5.0, training_s=0.0))
    first.add(Scored(0, Score("KID-pixels", 0.5, 0.1, 100)))
    again = open_events(tmp_path)
    assert (again.key, again.events) == (first.key, first.events)
    assert again.trials() == first.trials()
    finished, failed, running = again.trials()
    assert (finished.status, finished.images_seen, finished.wall_s) == ("finished", 128, 20.0)
    assert finished.score == Score("KID-pixels", 0.5, 0.1, 100)
    assert failed == Trial(1, {"optim.lr": 0.1 + 0.2}, status="failed", reason="it broke", wall_s=5.0)
    assert running == Trial(2, {"optim.lr": 0.1 + 0.2}, repeats=0)


def test_another_search_with_the_same_name_is_rejected(tmp_path: Path) -> None:
    open_events(tmp_path)
    with pytest.raises(UserError, match=r"seed 0, not 1.*--name"):
        open_events(tmp_path, seed=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{", "it is not JSON"),
        ({"format": "ddpm-search/1"}, "format is 'ddpm-search/1'"),
        ([{"event": "judged"}], "events.0 has no known 'event'"),
        ([{"event": "begun", "trial": -1, "changes": {}}], "events.0.begun.trial is -1"),
    ],
)
def test_a_damaged_event_log_is_a_one_line_error(tmp_path: Path, damage: Any, message: str) -> None:
    card = {"format": "ddpm-search/2", "search_key": "a", "settings": SETTINGS, "events": []}
    card |= {"events": damage} if isinstance(damage, list) else damage if isinstance(damage, dict) else {}
    text = damage if isinstance(damage, str) else json.dumps(card)
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(UserError, match=rf"search\.json is damaged.*: {message}"):
        open_events(tmp_path)
    assert (tmp_path / "search.json").read_text() == text


@pytest.mark.parametrize(
    ("total", "batch", "factor", "number", "expected"),
    [
        (9000, 10, 3, 3, [1000, 3000, 9000]),
        (9005, 10, 3, 3, [1000, 3000, 9010]),
        (192_000, 128, 3, 3, [21_248, 63_744, 192_000]),
        (100, 10, 3, 1, [100]),
        (40, 10, 3, 5, [10, 40]),  # 40 / 9 images would be less than a batch
        (10, 10, 3, 3, [10]),
    ],
)
def test_rungs(total: int, batch: int, factor: int, number: int, expected: list[int]) -> None:
    found = rungs(total, batch, factor, number)
    assert found == expected
    assert all(at % batch == 0 for at in found) and all(at % found[0] == 0 for at in found[:-1])


def test_best_ranks_only_trials_that_reached_the_last_rung() -> None:
    def trial(number: int, status: Any, *found: tuple[int, float], repeats: int | None = None) -> Trial:
        of = tuple(Rung(at, bits, 0.1, 1 - bits, 0.0) for at, bits in found)
        return Trial(number, {}, of, status, repeats=repeats)

    trials = [
        trial(0, "finished", (64, 2.0), (128, 1.5)),
        trial(1, "stopped", (64, 1.0)),  # better, but at an earlier rung
        trial(2, "finished", (64, 2.0), (128, 1.25)),
        trial(3, "failed", (64, 0.5), (128, 0.25)),
        trial(4, "failed"),
        trial(5, "finished", (64, 1.0), (128, 0.5), repeats=2),  # not a trial of the search itself
    ]
    assert [t.number for t in best(trials, "bits_per_dim")] == [2, 0]
    assert [t.number for t in best(trials, "held_out/loss")] == [0, 2]
    assert best([trials[4]], "bits_per_dim") == []
