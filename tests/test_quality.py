"""benchmarks/quality.py: turns, and the time at which a curve reaches a value, with known answers."""

import math
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from support.processes import REPO


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    names = (
        "quality",
        "harness",
        "harness.tables",
        "harness.turns",
        "harness.processes",
        "peers",
        "peers.quality",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "benchmarks")
        import quality

        yield quality
    for name in names:
        sys.modules.pop(name, None)


COUNT = """
import subprocess, sys, time
if sys.argv[1:] != ["child"]:
    subprocess.Popen([sys.executable, __file__, "child"])
with open("child" if sys.argv[1:] else "parent", "a", buffering=1) as file:
    while True:
        file.write(".")
        file.flush()
        time.sleep(0.001)
"""


def test_a_contestant_and_its_children_are_suspended_between_turns(
    quality: ModuleType, tmp_path: Path
) -> None:
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    contestant = quality.Contestant([sys.executable, str(script)], tmp_path, {})
    files = [tmp_path / "parent", tmp_path / "child"]

    def sizes() -> list[int]:
        return [file.stat().st_size if file.exists() else 0 for file in files]

    with quality.ended_after([contestant]):
        while 0 in sizes():
            contestant.turn(0.2)
        stopped = sizes()
        time.sleep(0.3)
        assert sizes() == stopped
        while any(now <= then for now, then in zip(sizes(), stopped, strict=True)):
            contestant.turn(0.2)
    ended = sizes()
    time.sleep(0.1)
    assert sizes() == ended
    turns = quality.read_turns(tmp_path)
    assert turns == contestant.turns and all(a.ended <= b.began for a, b in pairwise(turns))


def test_spent_time_excludes_the_time_between_turns(quality: ModuleType) -> None:
    turns = [quality.Turn(100, 160, 90), quality.Turn(300, 340, 170)]
    assert quality.spent(turns, 50) == quality.Spent(0, 0)
    assert quality.spent(turns, 130) == quality.Spent(30, 45)
    assert quality.spent(turns, 200) == quality.Spent(60, 90)
    assert quality.spent(turns, 310) == quality.Spent(70, 110)
    assert quality.spent(turns, 1e9) - quality.spent(turns, 130) == quality.Spent(70, 125)


def test_the_time_to_a_value_is_interpolated_in_log_log(quality: ModuleType) -> None:
    curve = [
        quality.Judged("ours", 0, minutes, 0.0, kid, kid / 10, 500)
        for minutes, kid in ((4, 0.25), (1, 4.0), (2, 1.0), (8, 0.3))
    ]
    assert quality.crossing(curve, 1.0) == pytest.approx(2)
    assert quality.crossing(curve, 0.5) == pytest.approx(2 * math.sqrt(2))  # half way from 1 to 1/4
    assert quality.crossing(curve, 5.0) == 1  # reached at the first point
    assert quality.crossing(curve, 0.2) == math.inf
    assert quality.crossing(curve, 0.5, -1) < quality.crossing(curve, 0.5) < quality.crossing(curve, 0.5, 1)
