"""EDM and flow matching beside eps, x_0 and v: bits/dim and KID after equal training.

    python benchmarks/objectives.py [--presets digits fashion-mnist] [--seeds 3]

Each choice trains the preset's net on the same images in the same order, and no choice costs more than another: equal
images are equal time, as the column of minutes shows. Runs of one seed follow each other, every other round backwards.
All nets are sampled alike, each on its own schedule. Values are means over seeds, with Student's 95 % interval. The
table goes to benchmarks/objectives.md, samples of the first seed beside it.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import tables, turns
from harness.arguments import read
from scipy import stats

from ddpm.build import TrainedNet
from ddpm.evaluation import context, evaluate
from ddpm.evaluation.memorisation import METRIC
from ddpm.evaluation.settings import Settings
from ddpm.presets import PRESETS
from ddpm.sampling import generate
from ddpm.utils import images as pictures

REPO = Path(__file__).parents[1]
KEYS = "objective.predict", "objective.weight", "objective.timesteps", "schedule.kind"
CHOICES = {
    "eps": ("eps", "simple", "uniform"),
    "x_0": ("x_0", "simple", "uniform"),
    "v": ("v", "simple", "uniform"),
    "v, min-SNR": ("v", "min_snr", "uniform"),
    "EDM": ("edm", "simple", "log_normal", "geometric"),
    "EDM on the preset's schedule": ("edm", "simple", "log_normal"),
    "flow matching": ("flow", "simple", "logit_normal", "straight"),
    "v as flow matching": ("v", "flow", "logit_normal", "straight"),
}
"""Values of KEYS; without a schedule that of the preset."""
STEPS = 20


@dataclass(frozen=True)
class Arguments:
    """What to train, and how often."""

    presets: tuple[str, ...] = ("digits",)
    choices: tuple[str, ...] = tuple(CHOICES)
    seeds: int = 3
    images: int | None = None
    """Images to train on. None: the preset's."""
    num_images: int = 2000
    """Images to sample from each net, and held-out images."""


def train(preset: str, folder: Path, name: str, images: int | None, *flags: str) -> float:
    """Train one run, FOLDER/NAME, as a user types it; returns minutes."""
    command = [sys.executable, str(REPO / "jobs/train.py"), preset]
    command += ["--run.storage", str(folder), "--run.name", name]
    command += ["--train.sample-every-images", "0", "--train.checkpoint-every-images", "0"]
    command += ["--train.total-images", str(images or PRESETS[preset].train.total_images)]
    command += flags
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    began = time.monotonic()
    subprocess.run(command, check=True, env=env, cwd=folder, stdout=subprocess.DEVNULL)
    return (time.monotonic() - began) / 60


def interval(values: list[float], digits: int) -> str:
    """Mean and 95 % interval over seeds; of one seed the value alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = stats.t(len(values) - 1).ppf(0.975) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def draw(nets: Sequence[TrainedNet], name: str) -> list[str]:
    """Write 16 samples of each net as benchmarks/NAME.png; returns the lines in Markdown that show it."""
    file = tables.result(Path(__file__).with_name(f"{name}.png"))
    rows = [generate.draw(net, range(16)).numpy() for net in nets]
    file.write_bytes(pictures.png_bytes(pictures.strip(rows)))
    print(f"picture     {file}")
    return ["", f"![The same 16 samples for each line of the table]({file.name})"]


def compare(
    preset: str,
    choices: Mapping[str, Sequence[str]],
    folder: Path,
    seeds: int,
    images: int | None,
    num_images: int,
    num_train_images: int = 0,
) -> tuple[list[list[str]], list[TrainedNet]]:
    """A row of each choice, whose flags are given: name, bits/dim, KID, minutes of training; and its first net.

    With `num_train_images` to search, the share of memorised images, by pixels, comes before the minutes.
    """
    done = Counter[str]()
    place = {choice: i for i, choice in enumerate(choices)}

    def measure(choice: str) -> float:
        seed = done[choice]
        done[choice] += 1
        flags = ["--train.seed", str(seed), *choices[choice]]
        return train(preset, folder, f"{place[choice]}-{seed}", images, *flags)

    minutes = turns.in_turns(list(choices), seeds, measure)
    candidates = context.read([str(folder / f"{i}-{seed}") for i in place.values() for seed in range(seeds)])
    settings = Settings(
        num_images=num_images,
        num_train_images=num_train_images,
        sampler=("dpmpp_2m",),
        num_sample_steps=(STEPS,),
        eta=1.0,
    )
    report = evaluate.evaluate(candidates, settings)
    rows = []
    for choice, i in place.items():
        results = report.results[i * seeds : (i + 1) * seeds]
        bits = [result.bits[0].value for result in results]
        scores = [score for result in results for score in result.drawn[0].scores]
        kid = [score.value for score in scores if score.name.startswith("KID")]
        copied = [score.value for score in scores if score.name == f"{METRIC}-pixels"]
        copies = [interval(copied, 3)] if num_train_images else []
        rows.append([choice, interval(bits, 3), interval(kid, 4), *copies, interval(minutes[choice], 2)])
    first = zip(candidates[::seeds], report.results[::seeds], strict=True)
    return rows, [net.sampled_with(result.drawn[0].sample) for net, result in first]


def main() -> None:
    arguments = read(Arguments, __doc__, choices=("flow matching",), seeds=2, images=640, num_images=30)
    flags = {
        choice: [
            word for pair in zip(KEYS, CHOICES[choice], strict=False) for word in (f"--{pair[0]}", pair[1])
        ]
        for choice in arguments.choices
    }
    lines, shown = list[list[str]](), list[str]()
    for preset in arguments.presets:
        with tempfile.TemporaryDirectory() as folder:
            numbers = arguments.seeds, arguments.images, arguments.num_images
            rows, nets = compare(preset, flags, Path(folder), *numbers)
        lines += [[preset, *row] for row in rows]
        shown += draw(nets, f"objectives-{preset}")
    how = (
        f"Held-out bits/dim and KID of {arguments.num_images} images ({STEPS} steps of `dpmpp_2m`, eta 1): mean and "
        f"95 % interval of {arguments.seeds} seeds (`python benchmarks/objectives.py`). {tables.machine()}."
    )
    names = "preset", "choice", "bits/dim", "KID", "minutes of training"
    tables.write(__file__, "What the net predicts", how, "", *tables.table(names, lines), *shown)


if __name__ == "__main__":
    main()
