"""What a training step costs as it grows: images/s over the batch and over the image size.

    python benchmarks/growth.py [--turns 3]

The net is that of benchmarks/step.py (64-128-128 channels, attention at half the image's size up to 16), each size a
process of its own; all take turns. The table goes to benchmarks/growth.md, the curves to benchmarks/growth.png.
"""

import datetime
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from runtime import processor, write_table
from step import Arguments as StepArguments
from step import Contestant, gigaflops, grown

PRECISIONS = {"float32": "ours, float32", "bfloat16": "ours, bfloat16"}


@dataclass(frozen=True)
class Arguments:
    """What to measure, and for how long."""

    batches: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """Of 32x32 images."""
    sizes: tuple[int, ...] = (8, 16, 32, 64)
    """In batches of 16."""
    turns: int = 3
    turn_s: float = 2.0
    """How long a turn lasts, about; at least a step."""
    device: Literal["cpu", "cuda"] = "cpu"


Size = tuple[int, int]
"""Batch, and pixels along an edge."""


def measure(arguments: Arguments, wanted: list[Size]) -> dict[tuple[str, Size], float]:
    """Images/s by precision and size: medians over turns."""
    found: dict[tuple[str, Size], list[float]] = {(p, size): [] for p in PRECISIONS for size in wanted}
    with tempfile.TemporaryDirectory() as folder:
        contestants = {}
        for precision, size in found:
            case = StepArguments(device=arguments.device, batch_size=size[0], image_size=size[1])
            place = Path(folder, f"{precision}-{size[0]}-{size[1]}")
            place.mkdir()
            contestants[precision, size] = Contestant(case, PRECISIONS[precision], place)
        try:
            steps = {}
            for key, contestant in contestants.items():
                contestant.turn(1)
                steps[key] = max(1, round(arguments.turn_s / contestant.turn(1)["seconds"]))
            for _ in range(arguments.turns):
                for key, contestant in contestants.items():
                    seconds = contestant.turn(steps[key])["seconds"]
                    found[key].append(steps[key] * key[1][0] / seconds)
                    print(f"{key}: {found[key][-1]:.2f} images/s", flush=True)
        finally:
            for contestant in contestants.values():
                contestant.end()
    return {key: statistics.median(values) for key, values in found.items()}


def draw(speed: dict[tuple[str, Size], float], by_batch: list[Size], by_size: list[Size], path: Path) -> None:
    """Both curves, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for precision in PRECISIONS:
        left.plot([b for b, _ in by_batch], [speed[precision, s] for s in by_batch], "o-", label=precision)
        right.plot([e for _, e in by_size], [speed[precision, s] for s in by_size], "o-", label=precision)
    left.set(xscale="log", xlabel="images a batch (32x32)", ylabel="images/s", ylim=(0, None))
    right.set(xscale="log", yscale="log", xlabel="pixels along an edge (batches of 16)", ylabel="images/s")
    for axes, ticks in ((left, [b for b, _ in by_batch]), (right, [e for _, e in by_size])):
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    by_batch = [(batch, 32) for batch in arguments.batches]
    by_size = [(16, size) for size in arguments.sizes]
    speed = measure(arguments, list(dict.fromkeys(by_batch + by_size)))
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    lines = [
        "# What a training step costs as it grows",
        "",
        f"Images/s and GFLOP/s of whole steps, medians of {arguments.turns} turns (`python benchmarks/growth.py`). "
        f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} cores of {where}, torch {torch.__version__}.",
        "",
        "![images/s over the batch and over the image size](growth.png)",
        "",
        "| batch | image | GFLOP an image | float32, images/s | GFLOP/s | bfloat16, images/s | GFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, edge in dict.fromkeys(by_batch + by_size):
        flops = gigaflops(grown(StepArguments(batch_size=batch, image_size=edge)))
        cells = [f"{speed[p, (batch, edge)]:.2f} | {speed[p, (batch, edge)] * flops:.0f}" for p in PRECISIONS]
        lines.append(f"| {batch} | {edge}x{edge} | {flops:.2f} | {' | '.join(cells)} |")
    draw(speed, by_batch, by_size, Path(__file__).with_suffix(".png"))
    write_table(__file__, lines)


if __name__ == "__main__":
    main()
