"""Recovery time after a crash: from the kill to the next completed step, beside a bare Ray Train without training.

    PYTHONPATH=tests python benchmarks/recovery.py [--repeats 3]

Both have two workers in a cluster started for the purpose, and restart after the same kill. The bare run's "step" is a
line written as soon as its function is entered again, so the difference is our part: imports, the checkpoint, the data
set, the first step. The table goes to benchmarks/recovery.md.
"""

import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
from harness import processes, tables, training, turns
from harness.arguments import read
from harness.training import tick, ticks
from ray.train.torch import TorchTrainer
from support.servers import RayHead, ray_head_env

from ddpm.cluster.ray_init import connect
from ddpm.config.presets import DIGITS

BACK_AFTER_S = 8.0
"""Seconds until a lost node comes back."""


@dataclass(frozen=True)
class Arguments:
    """How often to measure."""

    repeats: int = 3
    lost: tuple[Literal["worker", "node"], ...] = ("worker", "node")
    only: tuple[Literal["bare", "ours"], Literal["worker", "node"]] | None = None
    """One measurement, in seconds."""


def bare_work(spec: dict[str, Any]) -> None:
    """Do nothing but tick, until killed or the file `end` exists."""
    rank = ray.train.get_context().get_world_rank()
    while not Path(spec["folder"], "end").exists():
        if rank == 0:
            tick(spec["folder"])
        time.sleep(0.05)


def train(folder: str, resources: dict[str, float]) -> None:
    values = {
        "run.shared_storage": True,
        "cluster.num_workers": 2,
        "cluster.cpus_per_worker": resources["CPU"],
        "cluster.threads_per_worker": 1,
        "train.total_images": 192_000,
        "train.checkpoint_every_images": 1_280,
        "train.sample_every_images": 0,
    }
    try:
        training.train(DIGITS, folder, values)
    except Exception as error:  # the measurement is over, and shuts everything down
        print(f"({type(error).__name__})")


def bare(folder: str, resources: dict[str, float]) -> None:
    while not Path(folder, "end").exists():
        trainer = TorchTrainer(
            bare_work,
            train_loop_config={"folder": folder},
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker=resources),
            run_config=ray.train.RunConfig(
                storage_path=folder, failure_config=ray.train.FailureConfig(max_failures=-1)
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError:  # a worker died before Ray Train took its group for started
            print("  Ray Train gave up, and is started again", flush=True)


def recovery_s(folder: str, thread: threading.Thread, kill: Callable[[], None]) -> float:
    """Seconds from `kill` to the first tick of a new process of the run that `thread` drives."""
    while sum(map(len, ticks(folder).values())) < 60 or not _safe(folder):
        _check(thread)
        time.sleep(0.1)
    old = set(ticks(folder))
    killed = time.time()
    kill()
    while not (new := [t for pid, times in ticks(folder).items() if pid not in old for t in times]):
        _check(thread)
        time.sleep(0.05)
    entered = [float(path.read_text()) for path in Path(folder).glob("*.entered") if path.stem not in old]
    for at in entered:
        print(f"  a worker had entered its function after {at - killed:.1f} s", flush=True)
    return min(new) - killed


def _check(thread: threading.Thread) -> None:
    if not thread.is_alive():
        raise RuntimeError("the run has ended")


def _safe(folder: str) -> bool:
    """Whether the run has a checkpoint to restore; the bare run needs none."""
    run = Path(folder, "bench")
    return not run.exists() or any(run.glob("checkpoint-*/checksums.json"))


def measure(start: Callable[[str, dict[str, float]], None], lose_node: bool) -> float:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        head = stack.enter_context(RayHead(Path(folder, "head"), num_cpus=0, env=ray_head_env()))
        nodes = [stack.enter_context(head.add_node(num_cpus)) for num_cpus in (1, 2, 2)]
        os.environ["RAY_ADDRESS"] = head.address
        connect()

        def kill() -> None:
            if lose_node:
                nodes[-1].kill()
                timer = threading.Timer(BACK_AFTER_S, lambda: stack.enter_context(head.add_node(2)))
                timer.start()
                return
            children = psutil.Process(nodes[-1].pid).children(recursive=True)
            workers = [child for child in children if child.name().startswith("ray::RayTrainWo")]
            workers[0].send_signal(signal.SIGKILL)

        thread = threading.Thread(target=start, args=(folder, {"CPU": 1.5}), daemon=True)
        thread.start()
        took = recovery_s(folder, thread, kill)
        Path(folder, "end").touch()
        return took  # without ray.shutdown(): the other thread is still in a call into Ray


def measure_alone(key: tuple[str, str]) -> float:
    """`measure` in a separate process: threads of a stopped cluster's driver end with that process."""
    command = [sys.executable, __file__, "--only", *key]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="")
    return float(processes.read_answer(done.stdout))


STARTS = {"bare": bare, "ours": train}
LOST = {"worker": "a worker", "node": f"a node, which is back {BACK_AFTER_S:.0f} s later"}


def main() -> None:
    arguments = read(Arguments, __doc__, repeats=1, lost=("worker",))
    if arguments.only is not None:
        name, lost = arguments.only
        processes.answer(measure(STARTS[name], lost == "node"))
        os._exit(0)  # without waiting for the threads of the stopped cluster
    keys = list(itertools.product(STARTS, arguments.lost))
    write(arguments, turns.in_turns(keys, arguments.repeats, measure_alone))


def write(arguments: Arguments, found: dict[tuple[str, str], list[float]]) -> None:
    """The table, as Markdown."""
    how = (
        f"Seconds from the kill to the next completed step, 2 workers on 2 nodes of one machine; medians of "
        f"{arguments.repeats} (`PYTHONPATH=tests python benchmarks/recovery.py`). {tables.machine('ray')}."
    )
    rows = []
    for lost in arguments.lost:
        both = [found[name, lost] for name in STARTS]
        a, b = map(statistics.median, both)
        every = "; ".join(", ".join(f"{t:.1f}" for t in times) for times in both)
        rows.append([LOST[lost], f"{a:.1f}", f"{b:.1f}", f"{b - a:.1f}", every])
    names = ["lost", "Ray Train that does nothing", "this project", "added", "all"]
    tables.write(__file__, "How long a crash takes", how, "", *tables.table(names, rows))


if __name__ == "__main__":
    main()
