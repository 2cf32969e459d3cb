"""What a checkpoint costs: the time for which training stops, with one every 100 steps of a 6 M-parameter net.

    python benchmarks/checkpoints.py [--steps 600]

One Ray worker with one torch thread, the run's folder on a disk. The worker times every save (the copy of net, EMA and
optimizer, and whatever waiting there is); the run without checkpoints beside it shows what writing in the
background takes from training on a machine without a core to spare. The table goes to benchmarks/checkpoints.md.
"""

import datetime
import json
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import tyro
from runtime import processor, write_table

from ddpm.build import build_net
from ddpm.cluster.ray_init import connect
from ddpm.config import Config, override
from ddpm.data import builtin, ray_dataset
from ddpm.presets import DIGITS
from ddpm.training import fit, worker_group
from ddpm.training.state import parameter_count

EVERY_STEPS, BATCH_SIZE = 100, 32
work = worker_group.work


@dataclass(frozen=True)
class Arguments:
    """How long to measure."""

    steps: int = 600
    """Of each run."""


def timed_work(folder: str, spec: dict[str, Any]) -> None:
    """Training, with every save and every step timed, in the worker; the times go into the folder."""
    from ddpm.training.recorder import Recorder
    from ddpm.training.worker import RayRuntime

    save, step = Recorder._save, RayRuntime.any_of
    saves: list[float] = []
    steps: list[float] = []

    def timed_save(*args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        save(*args, **kwargs)
        saves.append(time.perf_counter() - began)

    def timed_step(*args: Any) -> list[bool]:
        steps.append(time.perf_counter())
        return step(*args)

    Recorder._save, RayRuntime.any_of = timed_save, timed_step  # type: ignore[method-assign]
    work(spec)
    Path(folder, "times.json").write_text(json.dumps({"saves": saves, "wall": steps[-1] - steps[10]}))


def measure(config: Config) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        config = builtin.with_shards(override(config, {"run.storage": folder, "run.name": "bench"}))
        worker_group.work = partial(timed_work, folder)
        fit.fit(config, ray_dataset.open_configured(config))
        return json.loads(Path(folder, "times.json").read_text())


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    config = override(
        DIGITS,
        {
            "model.base_width": 80,
            "train.total_images": arguments.steps * BATCH_SIZE,
            "train.batch_size": BATCH_SIZE,
            "train.micro_batch_size": BATCH_SIZE,
            "train.log_every_images": 100 * BATCH_SIZE,
            "train.sample_every_images": 0,
            "train.held_out_images": 0,
            "sample.num_images": 1,
            "sample.num_sample_steps": 1,
            "cluster.threads_per_worker": 1,
        },
    )
    connect()
    found = {
        name: measure(override(config, {"train.checkpoint_every_images": every * BATCH_SIZE}))
        for name, every in (("none", 0), ("every 100 steps", EVERY_STEPS))
    }
    write(arguments, parameter_count(build_net(config)), found)


def write(arguments: Arguments, parameters: int, found: dict[str, dict[str, Any]]) -> None:
    """The table, as Markdown."""
    lines = [
        "# What a checkpoint costs",
        "",
        f"Digits with a net of {parameters / 1e6:.1f} M parameters ({parameters * 16 / 1e6:.0f} MB a checkpoint: net, "
        f"EMA, AdamW), {arguments.steps} steps of {BATCH_SIZE} images, one worker, one torch thread "
        f"(`python benchmarks/checkpoints.py`). {datetime.date.today()}, {os.cpu_count()} cores of {processor()}, "
        f"torch {torch.__version__}, Ray {ray.__version__}.",
        "",
        "| checkpoints | steps/s | training stopped, a checkpoint | share of wall time |",
        "|---|---|---|---|",
    ]
    for name, times in found.items():
        saves = times["saves"][:-1] if name != "none" else []  # the last one is the end of the run
        mean = sum(saves) / len(saves) if saves else 0.0
        share = sum(saves) / times["wall"]
        speed = (arguments.steps - 11) / times["wall"]
        lines.append(f"| {name} | {speed:.2f} | {mean * 1000:.0f} ms | {share:.2%} |")
    write_table(__file__, lines)


if __name__ == "__main__":
    main()
