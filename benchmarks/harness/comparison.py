"""Runs that a user could type, compared after equal training: their command, bits/dim and KID, their samples."""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from ddpm.build import TrainedNet
from ddpm.evaluation import evaluate, inputs
from ddpm.evaluation.memorisation import METRIC
from ddpm.evaluation.settings import Settings
from ddpm.sampling import generate
from ddpm.utils import images
from harness import pictures, tables, turns

REPO = Path(__file__).parents[2]
STEPS = 20
Measured = tuple[list[list[str]], list[TrainedNet]]
"""Rows of a table, and nets to draw samples of."""


def preset_of(name: str, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """The preset that trains a set, and all flags; of the emoji, written to FOLDER/emoji, fashion-mnist in colour."""
    if name != "emoji":
        return name, [*flags]
    emoji = pictures.save(folder / "emoji", pictures.emoji())
    return "fashion-mnist", ["--data.images", str(emoji), "--model.channels", "3", *flags]


def command(preset: str, folder: Path, name: str, *flags: str) -> list[str]:
    """`jobs/train.py PRESET` into FOLDER/NAME, without samples during training."""
    words = [sys.executable, str(REPO / "jobs/train.py"), preset]
    words += ["--run.storage", str(folder), "--run.name", name, "--train.sample-every-images", "0"]
    return [*words, *flags]


def train(preset: str, folder: Path, name: str, *flags: str) -> float:
    """Train one run, FOLDER/NAME, as a user of one or two cores types it; returns minutes."""
    workers = min(2, len(os.sched_getaffinity(0)))
    common = f"--train.checkpoint-every-images 0 --cluster.num-workers {workers}".split()
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    began = time.monotonic()
    words = command(preset, folder, name, *common, *flags)
    subprocess.run(words, check=True, env=env, cwd=folder, stdout=subprocess.DEVNULL)
    return (time.monotonic() - began) / 60


def interval(values: list[float], digits: int) -> str:
    """Mean and 95 % interval over seeds; of one seed the value alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = stats.t(len(values) - 1).ppf(0.975) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def each(parts: Mapping[str, Callable[[Path], Measured]]) -> tuple[list[list[str]], list[str]]:
    """Measure each part in a new folder, sample to benchmarks/PART.png; all rows, and Markdown to show the samples."""
    lines = list[list[str]]()
    shown = list[str]()
    for name, measure in parts.items():
        with tempfile.TemporaryDirectory() as folder:
            rows, nets = measure(Path(folder))
        file = tables.result(REPO / "benchmarks" / f"{name}.png")
        strip = images.strip([generate.draw(net, range(16)).numpy() for net in nets])
        file.write_bytes(images.png_bytes(strip))
        print(f"picture     {file}")
        lines += rows
        shown += ["", f"![The same 16 samples for each line of the table]({file.name})"]
    return lines, shown


def compare(
    preset: str,
    choices: Mapping[str, Sequence[str]],
    folder: Path,
    seeds: int,
    num_images: int,
    num_train_images: int = 0,
) -> Measured:
    """A row of each choice, whose flags are given: name, bits/dim, KID, minutes of training; and its first net.

    With `num_train_images` to search, the share of memorised images, by pixels, comes before the minutes.
    """
    done = Counter[str]()
    place = {choice: i for i, choice in enumerate(choices)}

    def measure(choice: str) -> float:
        seed = done[choice]
        done[choice] += 1
        flags = ["--train.seed", str(seed), *choices[choice]]
        return train(preset, folder, f"{place[choice]}-{seed}", *flags)

    minutes = turns.in_turns(list(choices), seeds, measure)
    candidates = inputs.read_checkpoints(
        [str(folder / f"{i}-{seed}") for i in place.values() for seed in range(seeds)]
    )
    settings = Settings(
        num_images=num_images,
        num_train_images=num_train_images,
        sampler="dpmpp_2m",
        num_sample_steps=STEPS,
        eta=1.0,
    )
    report = evaluate.evaluate(candidates, settings)
    rows = []
    for choice, i in place.items():
        results = report.results[i * seeds : (i + 1) * seeds]
        bits = [result.bits.value for result in results if result.bits]
        scores = [score for result in results for score in result.drawn.scores]
        kid = [score.value for score in scores if score.name.startswith("KID")]
        copied = [score.value for score in scores if score.name == f"{METRIC}-pixels"]
        copies = [interval(copied, 3)] if num_train_images else []
        rows.append([choice, interval(bits, 3), interval(kid, 4), *copies, interval(minutes[choice], 2)])
    first = zip(candidates[::seeds], report.results[::seeds], strict=True)
    return rows, [net.sampled_with(result.drawn.sample) for net, result in first]
