"""How much two trainings of one configuration differ: bits/dim of eight seeds, at a search's budget and the preset's.

    python benchmarks/spread.py [--presets digits fashion-mnist] [--budgets 25600 0]

Each line of the table is a search of one configuration, the preset's, which `--finalist-seeds` trains again; its
folder is runs/spread-PRESET-IMAGES, and the same command goes on where it stopped. The table goes to
benchmarks/spread.md.

Axes: K trainings, M held-out images.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
from harness import tables
from harness.arguments import read
from scipy import stats

from ddpm.config.presets import PRESETS
from ddpm.evaluation.ranking import paired_ranks
from ddpm.runs import storage as locations
from ddpm.runs.run_folder import RunStatus
from ddpm.search.trials import Trials

REPO = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Arguments:
    """What to train."""

    presets: tuple[str, ...] = ("digits", "fashion-mnist")
    budgets: tuple[int, ...] = (25_600, 0)
    """Images of a training; 0: the preset's."""
    seeds: int = 8
    max_concurrent: int = 2
    storage: str = "runs"


def search(arguments: Arguments, preset: str, total_images: int) -> locations.Location:
    """The folder of a search, which trains the preset with all seeds."""
    name = f"spread-{preset}-{total_images}"
    words = (
        f"{preset} --name {name} --storage {arguments.storage} --max-concurrent {arguments.max_concurrent} "
        f"--num-trials 1 --finalists 1 --finalist-seeds {arguments.seeds} --searcher grid --num-rungs 1 "
        f"--space optim.lr={PRESETS[preset].optim.lr} --drawn-images 20 --features pixels "
        f"--cluster.threads-per-worker 1 --train.total-images {total_images} --train.sample-every-images 0"
    )
    subprocess.run([sys.executable, str(REPO / "tune" / "search.py"), *words.split()], check=True)
    return locations.resolve(arguments.storage).child(name)


def measured(arguments: Arguments) -> Iterator[list[object]]:
    for preset in arguments.presets:
        for budget in arguments.budgets:
            total_images = budget or PRESETS[preset].train.total_images
            folder = search(arguments, preset, total_images)
            trials = [trial for trial in Trials(folder).all() if trial.status == RunStatus.FINISHED]
            bits = np.array([trial.last.bits for trial in trials if trial.last])
            yield [preset, f"{total_images:,}", *cells(bits)]


def cells(bits: np.ndarray) -> list[object]:
    """A line's cells for bits/dim [K, M]; the interval of the standard deviation is chi-square's, of 95 %."""
    k, m = bits.shape
    spread = bits.mean(1).std(ddof=1)
    of_images = bits.mean(0).std(ddof=1) / m**0.5
    low, high = spread * ((k - 1) / stats.chi2.ppf([0.975, 0.025], k - 1)) ** 0.5
    distinct = sum(a.worst < b.best for a, b in permutations(paired_ranks(bits), 2))
    pairs = f"{distinct} of {k * (k - 1) // 2}"
    return [k, m, f"{bits.mean():.4f}", f"{spread:.4f} ({low:.4f} to {high:.4f})", f"{of_images:.4f}", pairs]


def main() -> None:
    arguments = read(Arguments, __doc__, presets=("digits",), budgets=(640,), seeds=3)
    names = ["preset", "images seen", "runs", "held-out images", "mean bits/dim"]
    names += ["standard deviation between runs (95 %)", "error over images", "pairs of nets that differ"]
    tables.write(
        __file__,
        "How much two runs of one configuration differ",
        f"{tables.machine()}; `python benchmarks/spread.py`. Only `train.seed` differs: initial weights, order of "
        "images, noise. All runs of a line are measured on the same images with the same noise, so the error over "
        "images is common to them. Pairs of nets that differ: by the paired test of a search, corrected for their "
        "number (Holm). They are differences between nets; between configurations there is none.",
        "",
        *tables.table(names, measured(arguments)),
    )


if __name__ == "__main__":
    main()
