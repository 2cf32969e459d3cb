"""The cost of busy neighbours: images/s of `jobs/train.py` beside 0, 1 and 2 processes that compute all the time.

    python benchmarks/busy.py [--preset digits] [--repeats 3] [--turn-s 7]

Each row of the table is one run; rows differ in how OpenMP's threads wait (GCC's libgomp), and in the number of threads
or workers. All are started, then take turns: the others are suspended, so that a machine that gets busy slows all
equally. Speed is measured between the points that the run tracks during a turn. The table goes to benchmarks/busy.md
(for another preset to busy-PRESET.md), above the text written by hand.
"""

import os
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness import tables
from harness.arguments import read
from harness.processes import busy
from harness.turns import LOG, Contestant, Turn, ended_after, in_turns

from ddpm.runs import curves, storage
from ddpm.utils.openmp import SPIN_COUNT, VARIABLES

TRAIN = Path(__file__).resolve().parent.parent / "jobs/train.py"
FLAGS = """--train.total-images 1000000000 --train.log-every-images 128 --train.checkpoint-every-images 0
    --train.sample-every-images 0 --run.storage . --run.name run --cluster.num-workers 1""".split()
ONE, TWO = (["--cluster.threads-per-worker", number] for number in "12")
ONE_THREAD = "1 thread"
TWO_THREADS = f"2 threads, GOMP_SPINCOUNT={SPIN_COUNT}, ours"
ROWS: dict[str, tuple[dict[str, str], list[str]]] = {
    "2 threads, OMP_WAIT_POLICY=active": ({"OMP_WAIT_POLICY": "active"}, TWO),
    "2 threads, GOMP_SPINCOUNT=300000, libgomp's default": ({"GOMP_SPINCOUNT": "300000"}, TWO),
    TWO_THREADS: ({}, TWO),
    "2 threads, GOMP_SPINCOUNT=1000": ({"GOMP_SPINCOUNT": "1000"}, TWO),
    "2 threads, OMP_WAIT_POLICY=passive": ({"OMP_WAIT_POLICY": "passive"}, TWO),
    ONE_THREAD: ({}, ONE),
    "2 workers of 1 thread": ({}, [*ONE, "--cluster.num-workers", "2"]),
}
"""Environment and flags of each run. GOMP_SPINCOUNT=0 is what passive means."""
PRESETS = {"digits": ONE_THREAD, "fashion-mnist": TWO_THREADS}
"""The row of each preset's default settings."""
FIRST_STEP = re.compile(r"^images [1-9]", re.MULTILINE)
STARTING_S = 2.0
WARM_UP_S = 5.0
"""Length of the turns until the first step, and of the turn after it, in which MLflow is imported."""
SETTLING_S = 0.5
"""The beginning of a turn does not count."""


@dataclass(frozen=True)
class Arguments:
    """How long to measure."""

    preset: Literal["digits", "fashion-mnist"] = "digits"
    repeats: int = 3
    turn_s: float = 7.0
    rows: tuple[str, ...] = tuple(ROWS)
    neighbours: tuple[int, ...] = (0, 1, 2)


def main() -> None:
    arguments = read(Arguments, __doc__, repeats=1, turn_s=2.0, rows=(ONE_THREAD,), neighbours=(0,))
    rows = arguments.rows
    neighbours = arguments.neighbours
    with tempfile.TemporaryDirectory(prefix="bench-busy-", dir="/tmp") as folder:
        folders = {row: Path(folder, str(i)) for i, row in enumerate(rows)}
        runs = {row: contestant(arguments.preset, row, folders[row]) for row in rows}

        def turn(cell: tuple[str, int]) -> Turn:
            row, n = cell
            with busy(n):
                runs[row].turn(arguments.turn_s)
            return runs[row].turns[-1]

        with ended_after(list(runs.values())):
            for row, run in runs.items():
                start(row, run, folders[row])
            cells = in_turns([(row, n) for n in neighbours for row in rows], arguments.repeats, turn)
        tracked = {row: points(folders[row]) for row in rows}
    speeds = {cell: [speed(tracked[cell[0]], turn) for turn in turns] for cell, turns in cells.items()}
    write(arguments, speeds)


def contestant(preset: str, row: str, folder: Path) -> Contestant:
    """A run with a separate Ray cluster; its metrics stay in its folder, since no MLflow answers."""
    environment, flags = ROWS[row]
    folder.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "OMP_NUM_THREADS")}
    own = {
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    }
    command = [sys.executable, str(TRAIN), preset, *FLAGS, *flags]
    return Contestant(command, folder, kept | own | environment)


def start(row: str, run: Contestant, folder: Path) -> None:
    """Run until after the first step.

    Raises:
        RuntimeError: the run ended.
    """
    while True:
        run.turn(STARTING_S)
        log = (folder / LOG).read_text(errors="replace")
        if run.ended:
            raise RuntimeError(f"{row}:\n{log}")
        if FIRST_STEP.search(log):
            break
    run.turn(WARM_UP_S)
    print(f"{row}: trains after {run.turns[-1].ended - run.turns[0].began:.0f} s", flush=True)


def points(folder: Path) -> list[tuple[float, int]]:
    """Seconds since the epoch and images_seen, of every log line of a run."""
    logged = curves.read(storage.resolve(str(folder / "run"))).get("train/images_per_s", [])
    return [(point.timestamp_ms / 1000, point.images_seen) for point in logged]


def speed(tracked: list[tuple[float, int]], turn: Turn) -> float:
    """Images/s in a turn; nan: there are no two points in it."""
    inside = [point for point in tracked if turn.began + SETTLING_S <= point[0] <= turn.ended]
    if len(inside) < 2:
        return float("nan")
    began, first = inside[0]
    ended, last = inside[-1]
    return (last - first) / (ended - began)


def write(arguments: Arguments, speeds: dict[tuple[str, int], list[float]]) -> None:
    """The table, as Markdown."""
    preset = arguments.preset
    quiet = statistics.median(speeds[PRESETS[preset], 0])
    names = [""]
    cells = [[row] for row in arguments.rows]
    for n in arguments.neighbours:
        names += [f"{n} busy: images/s", "of the preset alone", "all turns"]
        for row, line in zip(arguments.rows, cells, strict=True):
            median = statistics.median(speeds[row, n])
            every = ", ".join(f"{value:,.0f}" for value in speeds[row, n])
            line += [f"{median:,.0f}", f"{median / quiet:.2f}", every]
    lines = tables.table(names, cells)
    about = (
        f"`jobs/train.py {preset}` beside processes that compute without end: medians of {arguments.repeats} turns of "
        f"{arguments.turn_s:g} s (`python benchmarks/busy.py --preset {preset}`). One worker, but for the last row; by "
        f"itself the preset has {PRESETS[preset]}. "
        f"GOMP_SPINCOUNT={SPIN_COUNT} holds unless the environment has one of these variables. "
        f"{tables.machine('ray')}."
    )
    script = __file__ if preset == "digits" else str(Path(__file__).with_stem(f"busy-{preset}"))
    tables.write(script, "Beside busy neighbours", about, "", *lines)


if __name__ == "__main__":
    main()
