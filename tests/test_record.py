"""docs/train.svg, which docs/record.py makes: an animation of terminal screens."""

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from types import ModuleType

import pytest
from support.processes import REPO

from ddpm.presets import PRESETS

SVG = "{http://www.w3.org/2000/svg}"
PROGRAM = """
from rich.console import Console
from rich.live import Live
with Live(console=Console(), auto_refresh=False) as live:
    for i in range(3):
        live.update(f"[bold]step {i}[/]\\nof three", refresh=True)
        print("printed", i)
print("the end")
"""


@pytest.fixture(scope="module")
def record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record", REPO / "docs/record.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_screens_are_those_of_a_terminal(record: ModuleType) -> None:
    shown = record.screens(["-c", PROGRAM], "$ program")
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", shown[-1][1]).splitlines()]
    assert lines == ["$ program", "printed 0", "printed 1", "printed 2", "step 2", "of three", "the end"]
    frames = [screen for _, screen in shown]
    svg = ElementTree.fromstring(record.animation([frames[0], frames[-1]], 0.5))
    first, second = svg.findall(f"{SVG}g")
    assert [frame.get("style") for frame in (first, second)] == [
        "animation-delay: 0s",
        "animation-delay: 0.5s",
    ]
    assert "the\xa0end" in "".join(second.itertext()) and "the\xa0end" not in "".join(first.itertext())


def test_the_recording_is_small_and_shows_a_complete_run() -> None:
    file = REPO / "docs/train.svg"
    assert file.stat().st_size < 200_000
    frames = ElementTree.parse(file).getroot().findall(f"{SVG}g")
    begin, end = "".join(frames[0].itertext()), "".join(frames[-1].itertext())
    assert "jobs/train.py" in begin and "starting" not in end
    total = f"{PRESETS['digits'].train.total_images:,}"
    for part in (total, "images/s", "goodput", "held-out", "checkpoint", "samples"):
        assert part in end, part
