"""The cost of a checkpoint: the time for which training stops, with one every 100 steps of a 6 M-parameter net.

    python benchmarks/checkpoints.py [--steps 600]

One Ray worker with one torch thread, the run's folder on a disk. The worker times every save (the copy of net, EMA and
optimizer, and any waiting); the run without checkpoints beside it shows how much background writing slows
training on a machine without a spare core. The table goes to benchmarks/checkpoints.md. With a GPU, which copies beside
the next step, only the difference of the two runs shows what it costs; that table goes to checkpoints-gpu.md.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import tables, training
from harness.arguments import read

from ddpm.build import build_net
from ddpm.cluster.ray_init import connect
from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.training.state import parameter_count
from ddpm.utils import devices

BATCH_SIZE = 32


@dataclass(frozen=True)
class Arguments:
    """How long to measure."""

    steps: int = 600
    """Steps of each run."""
    every_steps: int = 100
    """Steps between two checkpoints."""
    base_width: int = 80
    """Base width of the net. A net of 184 has as many weights as that of the preset cifar10."""


def timed_work(folder: str, spec: dict[str, Any]) -> None:
    """Training in the worker, with every save and every step timed; the times of saves go into the folder."""
    from ddpm.training.recorder import Recorder

    save = Recorder._save
    saves = list[float]()

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
    arguments = read(Arguments, __doc__, steps=30, every_steps=10)
    values = {
        "model.base_width": arguments.base_width,
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
        for name, every in (("none", 0), (f"every {arguments.every_steps} steps", arguments.every_steps))
    }
    write(arguments, parameter_count(build_net(override(DIGITS, values))), found)


def write(arguments: Arguments, parameters: int, found: dict[str, dict[str, Any]]) -> None:
    """The table, as Markdown."""
    device = devices.default()
    on_gpu = devices.default() != devices.CPU
    how = (
        f"Digits with a net of {parameters / 1e6:.1f} M parameters ({parameters * 16 / 1e6:.0f} MB a checkpoint: net, "
        f"EMA, AdamW), {arguments.steps} steps of {BATCH_SIZE} images, one worker, one torch thread "
        f"(`python benchmarks/checkpoints.py`). {tables.machine('ray', device=device.type)}."
    )
    rows = []
    without = found["none"]["wall"]
    for name, times in found.items():
        saves = times["saves"][:-1] if name != "none" else []  # the last one is the end of the run
        count = max(1, len(saves))
        speed = (arguments.steps - 11) / times["wall"]
        longer = (times["wall"] - without) / count
        stopped = f"{sum(saves) / count * 1000:.0f} ms", f"{sum(saves) / times['wall']:.2%}"
        rows.append([name, f"{speed:.2f}", *stopped, f"{longer * 1000:.0f} ms"])
    names = ["checkpoints", "steps/s", "training stopped, a checkpoint", "share of wall time"]
    lines = [how, "", *tables.table([*names, "the run is longer by, a checkpoint"], rows)]
    if on_gpu:
        lines += ["", "Its last column replaces the time of the copy in docs/design/scale.md, Checkpoints."]
    script = Path(__file__).with_stem("checkpoints-gpu" if on_gpu else "checkpoints")
    tables.write(str(script), "What a checkpoint costs", *lines)


if __name__ == "__main__":
    main()
