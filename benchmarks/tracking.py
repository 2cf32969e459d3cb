"""What MLflow's absence costs training: images/s with a server that is there, dies, was never there, or hangs.

    PYTHONPATH=tests python benchmarks/tracking.py [--repeats 3]

One Ray worker with one torch thread, a metric point every 20 steps and a grid every 200. The four take turns, so that
a machine that grows busy slows all. The table goes to benchmarks/tracking.md.
"""

import datetime
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import tyro
from runtime import processor, write_table
from servers import LOOPBACK, MlflowServer, free_ports

from ddpm.cluster.ray_init import connect
from ddpm.config import override
from ddpm.data import builtin, ray_dataset
from ddpm.presets import DIGITS
from ddpm.training import fit, worker_group

CONDITIONS = ("there", "killed after 5 s, back after 15 s", "never there", "accepts and hangs")
work = worker_group.work


@dataclass(frozen=True)
class Arguments:
    """How long to measure."""

    repeats: int = 3
    images: int = 38_400


def timed_work(folder: str, spec: dict[str, Any]) -> None:
    """Training, with the time of every step, which goes into the folder; in the worker."""
    from ddpm.training.worker import RayRuntime

    flags = RayRuntime.any_of
    steps: list[float] = []

    def timed_step(*args: Any) -> list[bool]:
        steps.append(time.perf_counter())
        return flags(*args)

    RayRuntime.any_of = timed_step  # type: ignore[method-assign]
    work(spec)
    Path(folder, "steps.json").write_text(json.dumps(steps))


@contextmanager
def mlflow(condition: str, folder: Path) -> Iterator[str]:
    """The URI of an MLflow server in that condition."""
    if condition == "never there":
        yield f"http://{LOOPBACK}:{free_ports(1)[0]}"
    elif condition == "accepts and hangs":
        with socket.create_server((LOOPBACK, 0), backlog=50) as server:
            yield f"http://{LOOPBACK}:{server.getsockname()[1]}"
    else:
        with MlflowServer(folder) as server:
            timers = []
            if condition != "there":
                timers = [threading.Timer(5, server.kill), threading.Timer(15, server.start)]
            for timer in timers:
                timer.start()
            yield server.uri
            for timer in timers:
                timer.cancel()
                timer.join()


def measure(arguments: Arguments, condition: str) -> float:
    """Images/s."""
    with tempfile.TemporaryDirectory() as name, mlflow(condition, Path(name, "mlflow")) as uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
        values = {
            "run.storage": name,
            "run.name": "bench",
            "train.total_images": arguments.images,
            "train.log_every_images": 2_560,
            "train.checkpoint_every_images": 6_400,
            "train.sample_every_images": 25_600,
            "cluster.threads_per_worker": 1,
        }
        config = builtin.with_shards(override(DIGITS, values))
        fit.DELIVERY_TIMEOUT_S = 1.0  # what is after the end is not measured
        worker_group.work = partial(timed_work, name)
        fit.fit(config, ray_dataset.open_configured(config))
        steps = json.loads(Path(name, "steps.json").read_text())
        return (len(steps) - 21) * config.train.batch_size / (steps[-1] - steps[20])


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    connect()
    found: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
    for i in range(arguments.repeats):
        for condition in CONDITIONS if i % 2 == 0 else reversed(CONDITIONS):
            found[condition].append(measure(arguments, condition))
            print(f"{condition}: {found[condition][-1]:,.0f} images/s", flush=True)
    write(arguments, found)


def write(arguments: Arguments, found: dict[str, list[float]]) -> None:
    """The table, as Markdown."""
    speed = {condition: statistics.median(speeds) for condition, speeds in found.items()}
    lines = [
        "# What MLflow's absence costs training",
        "",
        f"Preset digits, one worker, one torch thread, {arguments.images:,} images a run; medians of "
        f"{arguments.repeats} runs that took turns (`PYTHONPATH=tests python benchmarks/tracking.py`). "
        f"{datetime.date.today()}, {os.cpu_count()} cores of {processor()}, torch {torch.__version__}, Ray "
        f"{ray.__version__}.",
        "",
        "| MLflow server | images/s | of the undisturbed run | all runs, images/s |",
        "|---|---|---|---|",
    ]
    for condition, speeds in found.items():
        every = ", ".join(f"{s:,.0f}" for s in speeds)
        lines.append(
            f"| {condition} | {speed[condition]:,.0f} | {speed[condition] / speed['there']:.3f} | {every} |"
        )
    write_table(__file__, lines)


if __name__ == "__main__":
    main()
