"""Muon beside AdamW, each at its best learning rate: bits/dim and KID after the same images.

    python benchmarks/optimizers.py [--sets digits fashion-mnist emoji] [--seeds 3]

The learning rate of each is the one with the lowest held-out bits/dim of one seed; nets are then trained and sampled
as objectives.py does. AdamW's steps are shorter, so it is trained on a quarter more images as well. No preset was tuned
on the emoji. The table goes to benchmarks/optimizers.md.
"""

import math
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import tables
from harness.arguments import read
from harness.comparison import STEPS, Measured, compare, each, preset_of, train

from ddpm.runs import curves, storage

IMAGES = {"digits": 48_000, "fashion-mnist": 25_600, "emoji": 25_600}
"""Images of a training."""
KINDS = {"AdamW": "adamw", "Muon": "muon"}
LONGER = 1.25


@dataclass(frozen=True)
class Arguments:
    """What to train, and how often."""

    sets: tuple[str, ...] = ("digits", "fashion-mnist")
    lrs: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 16e-3)
    """Learning rates among which each optimizer's is searched."""
    seeds: int = 3
    images: int | None = None
    """Images to train on. None: as many as fit into two minutes (IMAGES)."""
    num_images: int = 2000
    """Images to sample from each net, and held-out images."""


def held_out_bits(preset: str, folder: Path, name: str, *flags: str) -> float:
    """Bits/dim at the end of a training; infinite if it failed."""
    try:
        train(preset, folder, name, *flags, "--cluster.max-failures", "0")
    except subprocess.CalledProcessError:
        return math.inf
    return curves.read(storage.resolve(str(folder / name)))["held_out/bits_per_dim"][-1].value


def measure(arguments: Arguments, data: str, folder: Path) -> Measured:
    images = arguments.images or IMAGES[data]
    preset, common = preset_of(data, folder, "--train.total-images", str(images))
    choices = dict[str, list[str]]()
    for name, kind in KINDS.items():
        flags = {lr: [*common, "--optim.kind", kind, "--optim.lr", str(lr)] for lr in arguments.lrs}
        bits = {lr: held_out_bits(preset, folder, f"{kind}-{lr}", *flags[lr]) for lr in flags}
        print(data, name, bits, flush=True)
        best = min(bits, key=lambda lr: bits[lr])
        choices[f"{name}, learning rate {best:g}"] = flags[best]
    longer = ["--train.total-images", str(round(images * LONGER))]
    choices[f"AdamW, {LONGER:g} times the images"] = [*next(iter(choices.values())), *longer]
    rows, nets = compare(preset, choices, folder, arguments.seeds, arguments.num_images)
    return [[f"{data}, {images:,} images", *row] for row in rows], nets


def main() -> None:
    arguments = read(Arguments, __doc__, sets=("digits",), lrs=(2e-3,), seeds=2, images=640, num_images=30)
    lines, shown = each({f"optimizers-{data}": partial(measure, arguments, data) for data in arguments.sets})
    searched = ", ".join(f"{lr:g}" for lr in arguments.lrs)
    how = (
        f"Held-out bits/dim and KID of {arguments.num_images} images ({STEPS} steps of `dpmpp_2m`, eta 1): mean and "
        f"95 % interval of {arguments.seeds} seeds, each optimizer at the best learning rate of {searched} "
        f"(`python benchmarks/optimizers.py`). {tables.machine()}."
    )
    names = "data", "optimizer", "bits/dim", "KID", "minutes of training"
    tables.write(__file__, "Muon beside AdamW", how, "", *tables.table(names, lines), *shown)


if __name__ == "__main__":
    main()
