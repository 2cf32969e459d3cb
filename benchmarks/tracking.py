"""The cost of a missing MLflow: images/s with a server that answers, dies, never existed, or hangs.

    PYTHONPATH=tests python benchmarks/tracking.py [--repeats 3]

One Ray worker with one torch thread, a metric point every 20 steps and a grid every 200. The four take turns, so that
a machine that gets busy slows all. The table goes to benchmarks/tracking.md.
"""

import socket
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import tables, training, turns
from harness.arguments import read
from support.servers import LOOPBACK, MlflowServer, free_ports

from ddpm.cluster.ray_init import connect
from ddpm.config.presets import DIGITS
from ddpm.training import fit

CONDITIONS = ("there", "killed after 5 s, back after 15 s", "never there", "accepts and hangs")


@dataclass(frozen=True)
class Arguments:
    """How long to measure."""

    repeats: int = 3
    images: int = 38_400
    conditions: tuple[str, ...] = CONDITIONS


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
        values = {
            "train.total_images": arguments.images,
            "train.log_every_images": 2_560,
            "train.checkpoint_every_images": 6_400,
            "train.sample_every_images": 25_600,
            "cluster.threads_per_worker": 1,
        }
        fit.PATIENCE_S = 1.0  # time after the end is not measured
        config = training.train(DIGITS, name, values, mlflow_uri=uri)
        (steps,) = training.ticks(name).values()
        return (len(steps) - 21) * config.train.batch_size / (steps[-1] - steps[20])


def main() -> None:
    arguments = read(Arguments, __doc__, repeats=1, images=6_400, conditions=CONDITIONS[::2])
    connect()
    write(
        arguments,
        turns.in_turns(arguments.conditions, arguments.repeats, lambda one: measure(arguments, one)),
    )


def write(arguments: Arguments, found: dict[str, list[float]]) -> None:
    """The table, as Markdown."""
    speed = {condition: statistics.median(speeds) for condition, speeds in found.items()}
    how = (
        f"Preset digits, one worker, one torch thread, {arguments.images:,} images a run; medians of "
        f"{arguments.repeats} runs that took turns (`PYTHONPATH=tests python benchmarks/tracking.py`). "
        f"{tables.machine('ray')}."
    )
    names = ["MLflow server", "images/s", "of the undisturbed run", "all runs, images/s"]
    rows = (
        [name, f"{s:,.0f}", f"{s / speed['there']:.3f}", ", ".join(f"{one:,.0f}" for one in found[name])]
        for name, s in speed.items()
    )
    tables.write(__file__, "What MLflow's absence costs training", how, "", *tables.table(names, rows))


if __name__ == "__main__":
    main()
