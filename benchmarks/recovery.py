"""How long a crash takes: from the kill to the next completed step, beside a bare Ray Train that does nothing.

    PYTHONPATH=tests python benchmarks/recovery.py [--repeats 3]

Both have two workers in a cluster started for the purpose, and restart from the same kill. The bare run's
"step" is a line written as soon as its function is entered again: what is between the two is ours: imports, the
checkpoint, the data set, the first step. The table goes to benchmarks/recovery.md.
"""

import datetime
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
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
import torch
import tyro
from processes import REPO
from ray.train.torch import TorchTrainer
from runtime import processor, write_table
from servers import RayHead

from ddpm.cluster.ray_init import connect
from ddpm.config import override
from ddpm.data import builtin, ray_dataset
from ddpm.presets import DIGITS
from ddpm.training import fit, worker_group

BACK_AFTER_S = 8.0
"""A lost node comes back so much later."""
work = worker_group.work


@dataclass(frozen=True)
class Arguments:
    """How often to measure."""

    repeats: int = 3
    only: tuple[Literal["bare", "ours"], Literal["worker", "node"]] | None = None
    """One measurement, in seconds."""


def tick(folder: str) -> None:
    """A step was completed, by this process."""
    with Path(folder, f"{os.getpid()}.ticks").open("a") as file:
        file.write(f"{time.time()}\n")


def timed_work(folder: str, spec: dict[str, Any]) -> None:
    """Training; each step of rank 0 leaves a tick in the folder."""
    from ddpm.training.worker import RayRuntime

    flags = RayRuntime.any_of
    Path(folder, f"{os.getpid()}.entered").write_text(str(time.time()))

    def timed(self: RayRuntime, *args: Any) -> list[bool]:
        found = flags(self, *args)
        if self.rank == 0:
            tick(folder)
        return found

    RayRuntime.any_of = timed  # type: ignore[method-assign]
    work(spec)


def bare_work(spec: dict[str, Any]) -> None:
    """Nothing, for as long as it is not killed or told to end."""
    rank = ray.train.get_context().get_world_rank()
    while not Path(spec["folder"], "end").exists():
        if rank == 0:
            tick(spec["folder"])
        time.sleep(0.05)


def train(folder: str, resources: dict[str, float]) -> None:
    values = {
        "run.storage": folder,
        "run.name": "bench",
        "run.shared_storage": True,
        "cluster.num_workers": 2,
        "cluster.cpus_per_worker": resources["CPU"],
        "cluster.threads_per_worker": 1,
        "train.total_images": 192_000,
        "train.checkpoint_every_images": 1_280,
        "train.sample_every_images": 0,
    }
    config = builtin.with_shards(override(DIGITS, values))
    worker_group.work = partial(timed_work, folder)
    try:
        fit.fit(config, ray_dataset.open_configured(config))
    except Exception as error:  # the measurement is over, and shuts everything down
        print(f"({type(error).__name__})")


def bare(folder: str, resources: dict[str, float]) -> None:
    TorchTrainer(
        bare_work,
        train_loop_config={"folder": folder},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            storage_path=folder, failure_config=ray.train.FailureConfig(max_failures=-1)
        ),
    ).fit()


def ticks(folder: str) -> dict[str, list[float]]:
    return {
        path.stem: [float(line) for line in path.read_text().splitlines()]
        for path in Path(folder).glob("*.ticks")
    }


def recovery_s(folder: str, kill: Callable[[], None]) -> float:
    """Seconds from `kill` to the first tick of a process that is new."""
    while sum(map(len, ticks(folder).values())) < 60 or not _safe(folder):
        time.sleep(0.1)
    old, killed = set(ticks(folder)), time.time()
    kill()
    while not (new := [t for pid, times in ticks(folder).items() if pid not in old for t in times]):
        time.sleep(0.05)
    entered = [float(path.read_text()) for path in Path(folder).glob("*.entered") if path.stem not in old]
    for at in entered:
        print(f"  a worker had entered its function after {at - killed:.1f} s", flush=True)
    return min(new) - killed


def _safe(folder: str) -> bool:
    """Whether there is a checkpoint to go back to, where there are any."""
    run = Path(folder, "bench")
    return not run.exists() or any(run.glob("checkpoint-*/checksums.json"))


def measure(start: Callable[[str, dict[str, float]], None], lose_node: bool) -> float:
    lines = (REPO / "infra" / "ray-head.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        head = stack.enter_context(RayHead(Path(folder, "head"), num_cpus=0, env=settings))
        nodes = [stack.enter_context(head.add_node(num_cpus)) for num_cpus in (1, 2, 2)]
        os.environ["RAY_ADDRESS"] = head.address
        connect()

        def kill() -> None:
            if lose_node:
                nodes[-1].kill()
                timer = threading.Timer(BACK_AFTER_S, lambda: stack.enter_context(head.add_node(2)))
                timer.start()
                return
            processes = psutil.Process(nodes[-1].pid).children(recursive=True)
            workers = [p for p in processes if p.name().startswith("ray::RayTrainWo")]
            workers[0].send_signal(signal.SIGKILL)

        thread = threading.Thread(target=start, args=(folder, {"CPU": 1.5}), daemon=True)
        thread.start()
        took = recovery_s(folder, kill)
        Path(folder, "end").touch()
        ray.shutdown()
        return took


def measure_alone(name: str, lost: str) -> float:
    """`measure` in a process of its own: what a cluster that is gone leaves in a driver's threads ends with it."""
    command = [sys.executable, __file__, "--only", name, lost]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()  # Ray's may come after ours
    (took,) = (float(line.removeprefix(TOOK)) for line in lines if line.startswith(TOOK))
    print(*lines, f"{lost} {name}: {took:.1f} s", sep="\n", flush=True)
    return took


TOOK = "took, in seconds: "
STARTS = {"bare": bare, "ours": train}
LOST = {"worker": "a worker", "node": f"a node, which is back {BACK_AFTER_S:.0f} s later"}


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.only is not None:
        name, lost = arguments.only
        print(f"{TOOK}{measure(STARTS[name], lost == 'node')}", flush=True)
        os._exit(0)  # without waiting for the threads of the cluster that is gone
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.repeats):
        for lost in LOST:
            for name in STARTS:
                found.setdefault((lost, name), []).append(measure_alone(name, lost))
    write(arguments, found)


def write(arguments: Arguments, found: dict[tuple[str, str], list[float]]) -> None:
    """The table, as Markdown."""
    lines = [
        "# How long a crash takes",
        "",
        f"Seconds from the kill to the next completed step, 2 workers on 2 nodes of one machine; medians of "
        f"{arguments.repeats} (`PYTHONPATH=tests python benchmarks/recovery.py`). {datetime.date.today()}, "
        f"{os.cpu_count()} cores of {processor()}, torch {torch.__version__}, Ray {ray.__version__}.",
        "",
        "| lost | Ray Train that does nothing | this project | added | all |",
        "|---|---|---|---|---|",
    ]
    for lost, what in LOST.items():
        both = [found[lost, name] for name in STARTS]
        a, b = map(statistics.median, both)
        every = "; ".join(", ".join(f"{t:.1f}" for t in times) for times in both)
        lines.append(f"| {what} | {a:.1f} | {b:.1f} | {b - a:.1f} | {every} |")
    write_table(__file__, lines)


if __name__ == "__main__":
    main()
