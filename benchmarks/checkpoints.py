"""The cost of a checkpoint: the time for which training stops, with one every 100 steps of a 6 M-parameter net.

    python benchmarks/checkpoints.py [--steps 600]

One Ray worker with one torch thread, the run's folder on a disk. The worker times every save (the copy of net, EMA and
optimizer, and any waiting); the run without checkpoints beside it shows how much background writing slows
training on a machine without a spare core. The table goes to benchmarks/checkpoints.md.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from harness import tables, training

from ddpm.build import build_net
from ddpm.cluster.ray_init import connect
from ddpm.config import override
from ddpm.presets import DIGITS
from ddpm.training.state import parameter_count

EVERY_STEPS, BATCH_SIZE = 100, 32


@dataclass(frozen=True)
class Arguments:
    """How long to measure."""

    steps: int = 600
    """Steps of each run."""


def timed_work(folder: str, spec: dict[str, Any]) -> None:
    """Training in the worker, with every save and every step timed; the times of saves go into the folder."""
    from ddpm.training.recorder import Recorder

    save, saves = Recorder._save, list[float]()

    def timed_save(*args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        save(*args, **kwargs)
        saves.append(time.perf_counter() - began)

    Recorder._save = timed_save  # type: ignore[method-assign]
    training.timed_work(folder, spec)
    Path(folder, "saves.json").write_text(json.dumps(saves))


def measure(values: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        training.train(DIGITS, folder, values, timed_work)
        (steps,) = training.ticks(folder).values()
        saves = json.loads(Path(folder, "saves.json").read_text())
        return {"saves": saves, "wall": steps[-1] - steps[10]}


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    values = {
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
    }
    connect()
    found = {
        name: measure({**values, "train.checkpoint_every_images": every * BATCH_SIZE})
        for name, every in (("none", 0), ("every 100 steps", EVERY_STEPS))
    }
    write(arguments, parameter_count(build_net(override(DIGITS, values))), found)


def write(arguments: Arguments, parameters: int, found: dict[str, dict[str, Any]]) -> None:
    """The table, as Markdown."""
    how = (
        f"Digits with a net of {parameters / 1e6:.1f} M parameters ({parameters * 16 / 1e6:.0f} MB a checkpoint: net, "
        f"EMA, AdamW), {arguments.steps} steps of {BATCH_SIZE} images, one worker, one torch thread "
        f"(`python benchmarks/checkpoints.py`). {tables.machine('ray')}."
    )
    rows = []
    for name, times in found.items():
        saves = times["saves"][:-1] if name != "none" else []  # the last one is the end of the run
        mean = sum(saves) / len(saves) if saves else 0.0
        share = sum(saves) / times["wall"]
        speed = (arguments.steps - 11) / times["wall"]
        rows.append([name, f"{speed:.2f}", f"{mean * 1000:.0f} ms", f"{share:.2%}"])
    names = ["checkpoints", "steps/s", "training stopped, a checkpoint", "share of wall time"]
    tables.write(__file__, "What a checkpoint costs", how, "", *tables.table(names, rows))


if __name__ == "__main__":
    main()
