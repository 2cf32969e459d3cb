"""The progress of a search: one line per event in a log, or one live table in a terminal."""

import re
import sys

import pytest

from ddpm.search import scoreboard
from ddpm.search.event_log import Rung, Trial
from ddpm.search.scoreboard import Scoreboard

RUNG = Rung(6400, 2.5, 0.125, 0.5, 0.5)
TRIALS = [
    Trial(0, {"schedule.kind": "cosine", "optim.lr": 1e-3}, (RUNG,), "finished"),
    Trial(1, {"optim.lr": 1e2}, status="failed", reason="it broke"),
]


def test_without_a_terminal_each_event_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    board = Scoreboard(lambda: TRIALS, 4)
    board.news("trial-000 finished")
    board.news("trial-001 failed: it broke")
    assert capsys.readouterr().out == "trial-000 finished\ntrial-001 failed: it broke\n"


def test_without_a_terminal_a_line_per_interval_shows_that_the_search_is_alive(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Scoreboard(lambda: [*TRIALS, Trial(2, {})], 4)
    monkeypatch.setattr(scoreboard, "LINE_INTERVAL_S", 600.0)
    board.tick()
    monkeypatch.setattr(scoreboard, "LINE_INTERVAL_S", 0.0)
    board.tick()
    line = r"2 of 4 trials done after \d+ s, running: trial-002\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_in_a_terminal_a_table_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = TRIALS[:1]
    board = Scoreboard(lambda: shown, 4)
    with board.display:
        shown.append(TRIALS[1])
        board.news("trial-001 failed: it broke")
    out = capsys.readouterr().out
    last = out[out.rindex("2 of 4 trials") :]
    assert "2.5000 ± 0.1250" in last and "schedule.kind cosine, optim.lr 0.001" in last
    assert "failed: it broke" in last and "trial-001 failed: it broke\n" not in out
