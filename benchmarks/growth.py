"""Training speed at larger sizes: images/s over the batch, over the image size, and over workers.

    python benchmarks/growth.py [--turns 3]

The net is that of benchmarks/step.py (64-128-128 channels, attention at half the image's size up to 16). Each size has
a separate process; all take turns. Workers, each of one thread, train the preset digits with Ray, as in
benchmarks/runtime.py. The tables go to benchmarks/growth.md, the curves to benchmarks/growth.png.
"""

import itertools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from harness import tables, turns
from harness.arguments import read
from matplotlib.figure import Figure
from peers.step import Case
from runtime import Arguments as RunArguments
from runtime import run
from step import Contestant, gigaflops

from ddpm.models.precision import has_bfloat16


@dataclass(frozen=True)
class Arguments:
    """What to measure, and for how long."""

    batches: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """Batch sizes of 32x32 images."""
    sizes: tuple[int, ...] = (8, 16, 32, 64)
    """Image sizes, in batches of 16."""
    workers: tuple[int, ...] = (1, 2)
    images: int = 48_000
    """Images that workers train on in a turn."""
    turns: int = 3
    turn_s: float = 2.0
    """Approximate length of a turn; at least a step."""
    device: Literal["cpu", "cuda"] = "cpu"


Size = tuple[int, int]
"""Batch, and pixels along an edge."""


def measure(arguments: Arguments, wanted: list[Size]) -> dict[tuple[str, Size], float]:
    """Images/s by precision, of those that the device has instructions for, and size: medians over turns."""
    precisions = ["float32"]
    if has_bfloat16(torch.device(arguments.device)):
        precisions.append("bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        contestants = {}
        for precision, size in itertools.product(precisions, wanted):
            case = Case(device=arguments.device, batch_size=size[0], image_size=size[1])
            place = Path(folder, f"{precision}-{size[0]}-{size[1]}")
            place.mkdir()
            contestants[precision, size] = Contestant(case, f"ours, {precision}", place)
        with turns.ended_after(list(contestants.values())):
            steps = {}
            for key, contestant in contestants.items():
                contestant.turn(1)
                steps[key] = max(1, round(arguments.turn_s / contestant.turn(1)["seconds"]))

            def speed(key: tuple[str, Size]) -> float:
                return steps[key] * key[1][0] / contestants[key].turn(steps[key])["seconds"]

            found = turns.in_turns(list(contestants), arguments.turns, speed)
    return {key: statistics.median(values) for key, values in found.items()}


def measure_workers(arguments: Arguments) -> dict[int, float]:
    """Images/s by number of workers: medians over turns."""
    images = RunArguments(images=arguments.images)
    found = turns.in_turns(
        arguments.workers, arguments.turns, lambda workers: run(images, workers, 1, "ray").images_per_s
    )
    return {workers: statistics.median(speeds) for workers, speeds in found.items()}


def draw(
    speed: dict[tuple[str, Size], float],
    by_batch: list[Size],
    by_size: list[Size],
    by_workers: dict[int, float],
    path: Path,
) -> None:
    """The three curves, side by side."""
    figure = Figure((12, 3.6), layout="constrained")
    left, right, last = figure.subplots(1, 3)
    last.plot(list(by_workers), list(by_workers.values()), "o-", label="digits, float32")
    last.set(xlabel="workers of one thread", ylabel="images/s", ylim=(0, None))
    for precision in dict.fromkeys(precision for precision, _ in speed):
        left.plot([b for b, _ in by_batch], [speed[precision, s] for s in by_batch], "o-", label=precision)
        right.plot([e for _, e in by_size], [speed[precision, s] for s in by_size], "o-", label=precision)
    left.set(xscale="log", xlabel="images a batch (32x32)", ylabel="images/s", ylim=(0, None))
    right.set(xscale="log", yscale="log", xlabel="pixels along an edge (batches of 16)", ylabel="images/s")
    ticked = ((left, [b for b, _ in by_batch]), (right, [e for _, e in by_size]), (last, list(by_workers)))
    for axes, ticks in ticked:
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = read(Arguments, __doc__, batches=(4,), sizes=(8,), workers=(), turns=1, turn_s=0.1)
    by_batch = [(batch, 32) for batch in arguments.batches]
    by_size = [(16, size) for size in arguments.sizes]
    speed = measure(arguments, list(dict.fromkeys(by_batch + by_size)))
    by_workers = measure_workers(arguments) if arguments.device == "cpu" else {}
    measured = dict.fromkeys(precision for precision, _ in speed)
    of_precisions = [name for precision in measured for name in (f"{precision}, images/s", "GFLOP/s")]
    names = ["batch", "image", "GFLOP an image", *of_precisions]
    rows = []
    for batch, edge in dict.fromkeys(by_batch + by_size):
        flops = gigaflops(Case(batch_size=batch, image_size=edge).config())
        speeds = [speed[precision, (batch, edge)] for precision in measured]
        cells = [cell for value in speeds for cell in (f"{value:.2f}", f"{value * flops:.0f}")]
        rows.append([batch, f"{edge}x{edge}", f"{flops:.2f}", *cells])
    one = next(iter(by_workers.values()), 0.0)
    of_workers = [[workers, f"{value:,.0f}", f"{value / one:.2f}"] for workers, value in by_workers.items()]
    draw(speed, by_batch, by_size, by_workers, tables.result(Path(__file__).with_suffix(".png")))
    tables.write(
        __file__,
        "What training costs as it grows",
        f"Images/s and GFLOP/s of whole steps, medians of {arguments.turns} turns (`python benchmarks/growth.py`). "
        f"{tables.machine(device=arguments.device)}.",
        "",
        "![images/s over the batch, the image size and the workers](growth.png)",
        "",
        *tables.table(names, rows),
        "",
        *tables.table(["workers of one thread, preset digits", "images/s", "of one worker"], of_workers),
    )


if __name__ == "__main__":
    main()
