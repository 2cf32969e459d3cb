"""The progress display of a run: one live screen in a terminal, lines in a log."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.processes import REPO, run_in_terminal

from ddpm.training import run_state
from ddpm.training.screen import Screen, sparkline
from ddpm.utils.progress import Progress


@pytest.mark.parametrize(
    ("values", "curve"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([5.0, 5.0], "▁▁"),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "▁▂▃▄▅▆▇█"),
        ([7.0, math.nan, 0.0, math.inf], "█▁"),
        ([0.0] * 40 + [1.0] * 40, "▁" * 20 + "█" * 20),
        ([*range(100)], "▁▁▁" + "".join(level * 5 for level in "▂▃▄▅▆▇") + "█" * 7),
        ([1e6, 7.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], "███▇▆▅▄▃▂▁"),  # a high initial loss
    ],
)
def test_sparkline(values: list[float], curve: str) -> None:
    assert sparkline(values) == curve


def progress_values(images_seen: int, **more: Any) -> dict[str, Any]:
    return {run_state.PROGRESS: Progress(images_seen, 1000, 500.0, 0.25), **more}


def test_a_log_gets_lines_with_mfu_if_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen("a", 1000, lambda: 0) as screen:
        screen.update({run_state.WORKERS: 1})  # the workers have not started
        screen.update(progress_values(100))
        screen.update(
            progress_values(1000, metrics={"train/mfu": [(1000, 0.123)], "train/loss": [(1000, 0.25)]})
        )
    assert capsys.readouterr().out.splitlines() == [
        "images 100/1,000  500 images/s  loss 0.2500",
        "images 1,000/1,000  500 images/s  MFU 12%  loss 0.2500",
    ]


def test_run_state_keeps_the_newest_points_until_the_driver_reads_them() -> None:
    state = run_state.RunState({})
    for seen in range(10):
        state.set(run_state.METRICS, ({"train/loss": seen / 2}, seen))
    assert state.snapshot()[run_state.METRICS] == {"train/loss": [(seen, seen / 2) for seen in range(2, 10)]}


SCREEN_PROGRAM = """
from ddpm.training import run_state
from ddpm.training.screen import Screen
from ddpm.utils.progress import Progress

with Screen("my run", 1000, lambda: 2) as screen:
    for seen, loss in ((250, 0.5), (500, 0.25)):
        metrics = {"train/loss": (seen, loss), "held_out/loss": (500, 0.375), "train/goodput": (seen, 0.9),
            "held_out/bits_per_dim": (500, 2.5), "held_out_error/bits_per_dim": (500, 0.125),
            "train/mfu": (seen, 0.4), "train/gpu_peak_memory_share": (seen, 0.333)}
        metrics = {name: [point] for name, point in metrics.items()}
        screen.update({run_state.PROGRESS: Progress(seen, 1000, 50.0, loss), run_state.METRICS: metrics,
            run_state.WORKERS: 2, run_state.COMMITTED: 250})
        print("warning: seen above", flush=True)
"""


SMALL = "--model.base-width 8 --model.norm-groups 4 --schedule.num-timesteps 50"


def last_screen(shown: str, name: str) -> list[str]:
    """The lines of the last screen, without colours."""
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.rpartition(f"\x1b[1m{name}")[2])
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize(("encoding", "curve", "error"), [("utf-8", "█▁", "±"), ("ascii", "#.", "+-")])
def test_a_terminal_shows_one_live_screen(tmp_path: Path, encoding: str, curve: str, error: str) -> None:
    env = {"PYTHONPATH": str(REPO), "PYTHONIOENCODING": encoding}
    code, shown = run_in_terminal([sys.executable, "-c", SCREEN_PROGRAM], tmp_path, env)
    assert code == 0, shown
    lines = last_screen(shown, "my run")
    assert lines[1].endswith("500 of 1,000 0:00:10 left")
    assert lines[2:6] == [
        "speed 50 images/s MFU 40% 2 workers goodput 90.0%",
        f"loss {curve} 0.2500",
        f"held-out loss {curve[1]} 0.3750",
        f"bits/dim {curve[1]} 2.5000 {error} 0.1250",
    ]
    assert re.fullmatch(r"checkpoint 250 images, 0:0\d:\d\d ago MLflow: 2 checkpoints behind", lines[6])
    assert lines[7] == "GPU memory 33% at its peak"
    assert shown.count("warning: seen above") == 2
    assert "\x1b[?25h" in shown.rpartition("MLflow")[2]  # the cursor is shown again


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_training_on_a_terminal(tmp_path: Path) -> None:
    words = f"jobs/train.py digits --name a --total-images 6400 --workers 2 --sampler ddpm {SMALL}".split()
    words += "--train.log-every-images 1600 --train.checkpoint-every-images 3200".split()
    code, shown = run_in_terminal([sys.executable, str(REPO / words[0]), *words[1:]], tmp_path)
    assert code == 0, shown
    assert re.search(r"starting +0:0\d:\d\d for Ray's workers", shown)
    lines = last_screen(shown.partition("trained ")[0], "a")
    assert lines[1].endswith("6,400 of 6,400 0:00:00 left")
    assert re.fullmatch(r"speed [\d,]+ images/s.* 2 workers goodput 100.0%", lines[2])
    assert re.fullmatch(r"loss [▁▂▃▄▅▆▇█]{4} 0\.\d{4}", lines[3]), lines
    assert re.fullmatch(r"held-out loss [▁█]{2} 0\.\d{4}", lines[4]), lines
    assert any(line.startswith("checkpoint 6,400 images, 0:0") for line in lines)
    assert "MLflow      run " in shown
