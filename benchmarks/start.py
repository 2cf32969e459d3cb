"""Time from the command `python jobs/train.py digits` to its first step, beside a bare TorchTrainer.

    python benchmarks/start.py [--repeats 3] [--workers 1 2]

Runs the real command, with an empty folder for its data and an existing MLflow database, and samples its processes.
Bare is benchmarks/peers/bare_trainer.py: no data, no checkpoint, one step on noise. The two take turns, so that a
machine that gets busy slows both. The table goes to benchmarks/start.md.
"""

import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from harness import processes, tables, turns
from harness.arguments import read

HERE = Path(__file__).resolve().parent.parent
SAMPLE_S = 0.1
FLAGS = """--train.total-images 2048 --train.checkpoint-every-images 0 --train.sample-every-images 0
    --sample.num-images 1 --sample.num-sample-steps 1""".split()
OURS = "jobs/train.py"
BARE = "bare TorchTrainer"
FIRST_STEP = "first step"
TRAINED = "trained"
ENDED = "ended"
IDLE = "ray::IDLE"
UNKNOWN = "others"


@dataclass(frozen=True)
class Arguments:
    """What to measure, and how often."""

    repeats: int = 3
    workers: tuple[int, ...] = (1, 2)


@dataclass
class Start:
    """One run: moments in seconds since the command, and (first seen, CPU seconds) of each process."""

    moments: dict[str, float] = field(default_factory=dict)
    processes: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Until the first step, by title; processes with one title are added up."""
    cpu_s: float = 0.0
    """Until the end."""

    def __str__(self) -> str:
        moments = ", ".join(f"{name} {s:.1f}" for name, s in self.moments.items())
        return f"{moments} s; {self.cpu_s:.1f} s of CPU"


def measure(who: str, workers: int, folder: Path) -> Start:
    """Run the command once.

    Raises:
        RuntimeError: it failed.
    """
    if who == OURS:
        command = [sys.executable, OURS, "digits", *FLAGS, "--cluster.num-workers", str(workers)]
        command += ["--run.storage", str(folder / "runs"), "--run.name", "bench"]
    else:
        command = [sys.executable, "benchmarks/peers/bare_trainer.py", str(workers)]
    env = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{Path(tempfile.gettempdir(), 'bench-start-mlflow.db')}",
        "RAY_AUTH_MODE": "disabled",
    }
    start = Start()
    began = time.time()
    output = list[str]()
    driver = subprocess.Popen(
        command, cwd=HERE, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def read() -> None:
        assert driver.stdout is not None
        for line in driver.stdout:
            output.append(line)
            for word, moment in (("images ", FIRST_STEP), ("trained", TRAINED)):
                if line.startswith(word):
                    start.moments.setdefault(moment, time.time() - began)

    reader = threading.Thread(target=read)
    reader.start()
    seen: dict[int, tuple[str, float, float]] = {}
    while driver.poll() is None:
        _sample(driver.pid, seen, began)
        if FIRST_STEP in start.moments and not start.processes:
            start.processes = _added_up(seen)
        time.sleep(SAMPLE_S)
    start.moments[ENDED] = time.time() - began
    reader.join()
    if driver.returncode:
        raise RuntimeError("".join(output))
    start.cpu_s = sum(cpu_s for _, _, cpu_s in seen.values())
    return start


def _sample(root: int, seen: dict[int, tuple[str, float, float]], began: float) -> None:
    """Update (title, when it began, CPU seconds) of every process of the job."""
    for process in processes.family(root):
        try:
            cpu_s = processes.cpu_s(process)
            title = _title(process.cmdline())
        except psutil.Error:
            continue
        known = seen.get(process.pid)
        if known is not None and known[0] not in (UNKNOWN, IDLE):
            title = known[0]
        seen[process.pid] = (title, process.create_time() - began, cpu_s)


def _title(command: list[str]) -> str:
    """The kind of a process; for Ray's Python processes, its actor or task."""
    if command[:1] and command[0].startswith("ray::"):
        return re.split(r"[.(]", command[0])[0].strip()
    names = [Path(word).name for word in command[:4] if not word.startswith("-")]
    for name in ("gcs_server", "raylet", "monitor.py", "log_monitor.py", "dashboard.py"):
        if name in names:
            return name
    return "the driver" if OURS in command[1:2] or "bare_trainer.py" in names else UNKNOWN


def _added_up(seen: dict[int, tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    by_title: dict[str, tuple[float, float]] = {}
    for title, began, cpu_s in seen.values():
        first, total = by_title.get(title, (began, 0.0))
        by_title[title] = min(first, began), total + cpu_s
    return by_title


def main() -> None:
    arguments = read(Arguments, __doc__, repeats=1, workers=(1,))
    keys = [(who, workers) for workers in arguments.workers for who in (BARE, OURS)]

    def once(key: tuple[str, int]) -> Start:
        with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
            return measure(*key, Path(folder))

    write(arguments, turns.in_turns(keys, arguments.repeats, once))


def write(arguments: Arguments, found: dict[tuple[str, int], list[Start]]) -> None:
    """The table, as Markdown."""

    def median(key: tuple[str, int], value: Callable[[Start], float]) -> float:
        return statistics.median(value(start) for start in found[key])

    how = (
        "Beside a bare TorchTrainer, which has no data, no checkpoint and no MLflow, and takes one step on noise. The "
        f"digits are prepared on the way, MLflow's database was made before. Medians of {arguments.repeats} runs that "
        f"took turns (`python benchmarks/start.py`, `{_commit()}`). "
        f"{tables.machine('ray')}."
    )
    names = ["workers", "", "first step", "of bare", "trained", "ended", "CPU in all", "first step, all runs"]
    rows = []
    for who, workers in found:
        key = who, workers
        moments = [median(key, lambda s, m=m: s.moments[m]) for m in (FIRST_STEP, TRAINED, ENDED)]  # type: ignore[misc]
        ratio = moments[0] / median((BARE, workers), lambda s: s.moments[FIRST_STEP])
        every = ", ".join(f"{start.moments[FIRST_STEP]:.1f}" for start in found[key])
        first, *rest = (f"{s:.1f} s" for s in moments)
        cpu_s = median(key, lambda s: s.cpu_s)
        rows.append([workers, who, first, f"{ratio:.2f}", *rest, f"{cpu_s:.0f} s", every])
    lines = [how, "", *tables.table(names, rows)]
    for workers in arguments.workers:
        lines += ["", f"Processes until the first step, {workers} worker(s), of the last run:", ""]
        last = [found[who, workers][-1].processes for who in (BARE, OURS)]
        titles_seen = dict.fromkeys(title for processes in reversed(last) for title in processes)
        rows = []
        for title in sorted(titles_seen, key=lambda t: max(p[t][0] for p in last if t in p)):
            pairs = (
                (f"{max(p[title][0], 0):.1f} s", f"{p[title][1]:.2f} s") if title in p else "--" for p in last
            )
            rows.append([title, *itertools.chain(*pairs)])
        begins = itertools.chain(*((f"{who}: begins", "CPU") for who in (BARE, OURS)))
        lines += tables.table(["process", *begins], rows)
    tables.write(__file__, "From typing `python jobs/train.py digits` to its first step", *lines)


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
