"""Progress of long work: occasional lines in a log, a live bar in a terminal."""

import sys
from pathlib import Path

import pytest
from support.processes import run_in_terminal

from ddpm.utils import progress
from ddpm.utils.progress import Display


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A fake clock whose time only passes when a test sets it."""
    now = [5.0]  # as on a machine that has just booted
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_one_line_per_interval(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Display("images", 1000) as display:
        for done in range(0, 1001, 5):
            display.update(done, f"loss {done}")
            clock[0] += progress.LINE_INTERVAL_S / 32  # exactly representable in binary
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        [f"images {done:,}/1,000", f"loss {done}"] for done in (*range(0, 1000, 160), 1000)
    ]


def test_the_time_left_uses_the_speed_since_the_first_update(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Display("images", 100):
        pass  # without updates nothing is printed
    display = Display("images", 10_000)
    clock[0] += 500  # waiting for workers does not count as training
    display.update(4_000)  # resumed at this position
    clock[0] += 20
    display.update(5_000)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "images 4,000/10,000"
    assert second == "images 5,000/10,000  100 s left"


@pytest.mark.parametrize("total", [0, 10])
def test_the_last_line_is_printed_immediately_and_once(
    total: int, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Display("images", total) as display:
        for _ in range(3):
            display.update(total)
    assert capsys.readouterr().out == f"images {total}/{total}\n"


def test_a_delayed_update_is_printed_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError), Display("images", 100) as display:
        display.update(1)
        display.update(42, "loss 0.5")
        raise RuntimeError
    assert capsys.readouterr().out.splitlines() == ["images 1/100", "images 42/100  loss 0.5"]


@pytest.mark.lowest
def test_a_terminal_shows_one_progress_bar(tmp_path: Path) -> None:
    program = (
        "from ddpm.utils.progress import Display\n"
        "with Display('images', 2000) as display:\n"
        "    for done in (500, 2000):\n"
        "        display.update(done, f'[loss] {done / 1000}')\n"
    )
    code, text = run_in_terminal([sys.executable, "-c", program], tmp_path)
    assert code == 0, text
    assert "━" * 10 in text
    assert "2000/2000" in text
    assert "[loss] 2.0" in text
    assert "\x1b[?25h" in text.rpartition("2000/2000")[2]  # the cursor is shown again
    assert "2,000" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe 猫 C:\\new [b]", "größe 猫 C:\\new [b]"),
        ("a\nerror: b\r\t", "a\\nerror: b\\r\\t"),
        ("\x1b[31m\x9b2J\x07", "\\x1b[31m\\x9b2J\\x07"),
        ("\u202egpj.exe\u200b", "\\u202egpj.exe\\u200b"),  # right-to-left override; zero-width character
        ("\udcff\U000e0041", "\\udcff\\U000e0041"),
    ],
)
def test_external_text_is_escaped_to_one_line(text: str, shown: str) -> None:
    assert progress.printable(text) == shown
