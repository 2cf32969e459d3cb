"""What Ray costs: images/s of RayRuntime with one worker beside LocalRuntime, on the same data and net.

    python benchmarks/runtime.py [--repeats 3]

The two take turns, so that a machine that grows busy slows both. Every run is a process of its own; its speed
is that between two log points well after the start. The table goes to benchmarks/runtime.md.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

HERE = Path(__file__).parent
RUNTIMES = ("local", "ray")
Found = dict[tuple[int, str], list[tuple[float, float]]]
"""By threads and runtime: images/s and share of time waiting, of each run."""


@dataclass(frozen=True)
class Arguments:
    """How long to measure."""

    repeats: int = 3
    """Runs of each."""
    images: int = 64_000
    """Images a run; the first fifth does not count."""
    preset: str = "digits"
    threads: tuple[int, ...] = (1, 2)
    """torch threads; a measurement for each."""
    runtime: Literal["local", "ray"] | None = None
    """Measure this one alone, in this process."""


def measure(arguments: Arguments) -> None:
    """Train once, and print the log points as JSON."""

    from ddpm.config import override
    from ddpm.connection import connect
    from ddpm.data import embedded, stream
    from ddpm.presets import PRESETS
    from ddpm.training import cluster, loop
    from ddpm.training.runtime import LocalRuntime, NoTracker

    with tempfile.TemporaryDirectory() as folder:
        values = {
            "train.total_images": arguments.images,
            "train.log_every_images": arguments.images // 10,
            "train.checkpoint_every_images": 0,
            "train.sample_every_images": 0,
            "sample.num_images": 1,
            "sample.num_sample_steps": 1,
            "cluster.threads_per_worker": arguments.threads[0],
            "run.storage": folder,
            "run.name": "bench",
        }
        config = embedded.with_shards(override(PRESETS[arguments.preset], values))
        data_set = stream.open_data_set(config)
        if arguments.runtime == "local":
            torch.set_num_threads(arguments.threads[0])
            points: dict[int, dict[str, float]] = {}

            class Points(NoTracker):
                def metrics(self, values: dict[str, float], images_seen: int) -> None:
                    points.setdefault(images_seen, {}).update(values)

            loop.train(
                config, LocalRuntime(config, data_set, data_set.held_out(), Path(folder, "bench")), Points()
            )
        else:
            import mlflow

            os.environ["MLFLOW_TRACKING_URI"] = uri = f"sqlite:///{folder}/mlflow.db"
            connect()
            result = cluster.fit(config, data_set)
            assert result.delivery is not None and result.delivery.run_id is not None
            client = mlflow.MlflowClient(uri)
            points = {}
            for key in ("train/images_per_s", "train/data_wait_share"):
                for point in client.get_metric_history(result.delivery.run_id, key):
                    points.setdefault(point.step, {})[key] = point.value
        print("POINTS " + json.dumps(points))


def run(arguments: Arguments, runtime: str, threads: int) -> tuple[float, float]:
    """Images/s and the share of time spent waiting for data, of one run."""
    command = [sys.executable, __file__, "--images", str(arguments.images), "--preset", arguments.preset]
    command += ["--runtime", runtime, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    line = next(line for line in done.stdout.splitlines() if line.startswith("POINTS "))
    points = {int(step): values for step, values in json.loads(line.removeprefix("POINTS ")).items()}
    late = [values for step, values in points.items() if step > arguments.images / 5]
    speeds = [values["train/images_per_s"] for values in late]
    return statistics.median(speeds), statistics.mean(values["train/data_wait_share"] for values in late)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.runtime is not None:
        measure(arguments)
        return
    found: Found = {(threads, name): [] for threads in arguments.threads for name in RUNTIMES}
    for i in range(arguments.repeats):
        for threads, name in found if i % 2 == 0 else reversed(found):
            found[threads, name].append(run(arguments, name, threads))
            speed, wait = found[threads, name][-1]
            print(f"{threads} threads, {name:6} {speed:,.0f} images/s, waiting {wait:.2%}", flush=True)
    write(arguments, found)


def write(arguments: Arguments, found: Found) -> None:
    """The table, as Markdown."""
    import ray

    speed = {key: statistics.median(s for s, _ in runs) for key, runs in found.items()}
    wait = {key: statistics.median(w for _, w in runs) for key, runs in found.items()}
    titles = {"local": "LocalRuntime", "ray": "RayRuntime, MLflow on"}
    lines = [
        "# What Ray costs",
        "",
        f"Preset {arguments.preset}, one worker, {arguments.images:,} images a run; medians of {arguments.repeats} "
        f"runs that took turns (`python benchmarks/runtime.py`). {datetime.date.today()}, {os.cpu_count()} cores of "
        f"{processor()}, torch {torch.__version__}, Ray {ray.__version__}.",
        "",
        "| torch threads | runtime | images/s | of LocalRuntime | time waiting for data | all runs, images/s |",
        "|---|---|---|---|---|---|",
    ]
    for (threads, name), runs in found.items():
        ratio, every = speed[threads, name] / speed[threads, "local"], ", ".join(f"{s:,.0f}" for s, _ in runs)
        lines.append(
            f"| {threads} | {titles[name]} | {speed[threads, name]:,.0f} | {ratio:.3f} | {wait[threads, name]:.2%} "
            f"| {every} |"
        )
    lines += [
        "",
        "With as many threads as cores every moment that Ray's own processes run (about a tenth of a core, idle) "
        "stalls both threads of the worker at their next barrier; with a core to spare Ray costs nothing.",
    ]
    write_table(__file__, lines)


def write_table(script: str, lines: list[str]) -> None:
    """A benchmark's result, as Markdown beside it and on the terminal."""
    text = "\n".join(lines) + "\n"
    Path(script).with_suffix(".md").write_text(text)
    print(text)


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
