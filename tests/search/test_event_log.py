"""The event log of a search: it survives a reload, and rejects another search's or a damaged file."""

import json
from pathlib import Path
from typing import Any

import pytest

from ddpm.search.event_log import EventLog, Rung, Trial, best, rungs
from ddpm.storage import locations
from ddpm.utils.errors import UserError

SETTINGS = {"metric": "bits_per_dim", "space": {"optim.lr": [1e-4, 1e-2]}, "seed": 0}


def open_events(folder: Path, **changes: Any) -> EventLog:
    return EventLog(locations.resolve(str(folder)), SETTINGS | changes, timeout_s=0)


def add_judged(events: EventLog, trial: int, images_seen: int, bits: float) -> None:
    rung = vars(Rung(images_seen, bits, 0.1, 0.5, 0.4, 9.0))
    events.add("judged", trial, **rung, goes_on=True)


def test_events_survive_a_reload(tmp_path: Path) -> None:
    first = open_events(tmp_path)
    for number in range(3):
        first.add("begun", number, changes={"optim.lr": 0.1 + 0.2})  # a float with a long representation
    add_judged(first, 0, 64, 2.5)
    add_judged(first, 0, 128, 2.25)
    first.add("ended", 0, status="finished", reason="", wall_s=20.0, training_s=9.0)
    first.add("ended", 1, status="failed", reason="it broke", wall_s=5.0, training_s=0.0)
    first.add("drawn", 0, name="KID-pixels", value=0.5, error=0.1, n=100)
    again = open_events(tmp_path)
    assert (again.key, again.events) == (first.key, first.events)
    assert again.trials() == [
        Trial(
            0,
            {"optim.lr": 0.1 + 0.2},
            (Rung(64, 2.5, 0.1, 0.5, 0.4, 9.0), Rung(128, 2.25, 0.1, 0.5, 0.4, 9.0)),
            "finished",
            wall_s=20.0,
            drawn={"name": "KID-pixels", "value": 0.5, "error": 0.1, "n": 100},
        ),
        Trial(1, {"optim.lr": 0.1 + 0.2}, status="failed", reason="it broke", wall_s=5.0),
        Trial(2, {"optim.lr": 0.1 + 0.2}),
    ]
    assert list(again.shares()) == [(9.0, 20.0), (0.0, 5.0)]


def test_another_search_with_the_same_name_is_rejected(tmp_path: Path) -> None:
    open_events(tmp_path)
    with pytest.raises(
        UserError, match=r"was begun with seed 0, not 1; give the same value, or another --name"
    ):
        open_events(tmp_path, seed=1)


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"format": "ddpm-search/1"}',
        json.dumps({"format": "ddpm-search/0", "search_key": "a", "settings": {}, "events": []}),
        json.dumps(
            {
                "format": "ddpm-search/1",
                "search_key": "a",
                "settings": SETTINGS,
                "events": [{"event": "ended"}],
            }
        ),
        json.dumps(
            {
                "format": "ddpm-search/1",
                "search_key": "a",
                "settings": SETTINGS,
                "events": [
                    {"event": "begun", "trial": 0, "changes": {}},
                    {"event": "judged", "trial": 0, "bits": 1},
                ],
            }
        ),
    ],
)
def test_a_damaged_event_log_is_a_one_line_error(tmp_path: Path, damage: str) -> None:
    (tmp_path / "search.json").write_text(damage)
    with pytest.raises(UserError, match="is damaged"):
        open_events(tmp_path)
    assert (tmp_path / "search.json").read_text() == damage


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
    def trial(number: int, status: Any, *found: tuple[int, float]) -> Trial:
        return Trial(number, {}, tuple(Rung(at, bits, 0.1, 1 - bits, 0.0) for at, bits in found), status)

    trials = [
        trial(0, "finished", (64, 2.0), (128, 1.5)),
        trial(1, "stopped", (64, 1.0)),  # better, but at an earlier rung
        trial(2, "finished", (64, 2.0), (128, 1.25)),
        trial(3, "failed", (64, 0.5), (128, 0.25)),
        trial(4, "failed"),
    ]
    assert [t.number for t in best(trials, "bits_per_dim")] == [2, 0]
    assert [t.number for t in best(trials, "held_out/loss")] == [0, 2]
    assert best([trials[4]], "bits_per_dim") == []
