"""The progress of a search: one line per event in a log, or one live table in a terminal."""

import re
import sys

import pytest

from ddpm.evaluation.rung import Evaluation
from ddpm.runs.run_folder import RunStatus
from ddpm.search import tune_callbacks
from ddpm.search.trials import Trial
from ddpm.search.tune_callbacks import Scoreboard

RUNG = Evaluation(6400, (2.375, 9.0, 2.625, 9.0), 0.5, 0.5)
"""2.5 bits/dim with an error of 0.125 on every second image."""
TRIALS = [
    Trial(
        "digits-a", 0, {"schedule.kind": "cosine", "optim.lr": 1e-3}, status=RunStatus.FINISHED, rungs=(RUNG,)
    ),
    Trial("digits-b", 1, {"optim.lr": 1e2}, status=RunStatus.FAILED, reason="it broke"),
]


def test_without_a_terminal_each_event_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    board = Scoreboard(lambda: TRIALS, 4)
    board.news("digits-a finished")
    board.news("digits-b failed: it broke")
    assert capsys.readouterr().out == "digits-a finished\ndigits-b failed: it broke\n"


def test_without_a_terminal_a_line_per_interval_shows_that_the_search_is_alive(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Scoreboard(lambda: [*TRIALS, Trial("digits-c", 2, {})], 4)
    monkeypatch.setattr(tune_callbacks, "LINE_INTERVAL_S", 600.0)
    board.tick()
    monkeypatch.setattr(tune_callbacks, "LINE_INTERVAL_S", 0.0)
    board.tick()
    line = r"2 of 4 trials done after \d+ s, running: digits-c\n"
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
        board.news("digits-b failed: it broke")
    out = capsys.readouterr().out
    last = out[out.rindex("2 of 4 trials") :]
    assert "2.5000 ± 0.1250" in last and "schedule.kind cosine, optim.lr 0.001" in last
    assert "failed: it broke" in last and "digits-b failed: it broke\n" not in out
