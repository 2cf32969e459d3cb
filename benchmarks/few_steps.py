"""Consistency tuning (ECT): KID of few steps of a tuned net, and of a net that was trained for the same time.

    PYTHONPATH=examples/consistency python benchmarks/few_steps.py [--sets digits fashion-mnist emoji] [--seeds 3]

Of each seed, one net is trained on all images; another on half of them, and is then tuned on 3/8 of them. A step of
tuning has four passes through the net where one of training has three, so both cost the same, as the minutes show.
Values are means over seeds, with Student's 95 % interval. The table goes to benchmarks/few_steps.md, a row of samples
of the first seed for each of its lines beside it.
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from harness import tables
from harness.arguments import read
from harness.comparison import Measured, each, interval, preset_of, train

from ddpm.config.presets import PRESETS
from ddpm.evaluation import evaluate, inputs
from ddpm.evaluation.settings import Settings

SAMPLERS = {"trained": ("dpmpp_2m", "ddim"), "tuned": ("multistep",)}


@dataclass(frozen=True)
class Arguments:
    """What to train, and how often."""

    sets: tuple[str, ...] = ("digits",)
    seeds: int = 3
    images: int | None = None
    """Images to train on. None: the preset's."""
    lr: float = 2e-3
    """Learning rate of tuning."""
    steps: tuple[int, ...] = (1, 2, 5, 20)
    num_images: int = 2000
    """Images to sample from each net, and held-out images."""


def train_both(preset: str, seed: int, arguments: Arguments, folder: Path, *given: str) -> dict[str, float]:
    """Train the nets of one seed, FOLDER/trained-SEED and tuned-SEED; returns minutes."""
    total = arguments.images or PRESETS[preset].train.total_images
    flags = [*given, "--objective.predict", "v", "--train.seed", str(seed)]
    tuning = ["--objective.process", "consistency", "--train.init-from", str(folder / f"half-{seed}")]
    tuning += ["--sampler", "multistep", "--lr", str(arguments.lr), "--optim.lr-warmup-images", "1280"]

    def minutes(name: str, images: int, *more: str) -> float:
        return train(preset, folder, f"{name}-{seed}", "--train.total-images", str(images), *flags, *more)

    return {
        "trained": minutes("trained", total),
        "tuned": minutes("half", total // 2) + minutes("tuned", total * 3 // 8, *tuning),
    }


def compare(arguments: Arguments, name: str, folder: Path) -> Measured:
    """A row for each net and sampling configuration, and the first seed's nets."""
    preset, flags = preset_of(name, folder)
    minutes = [train_both(preset, seed, arguments, folder, *flags) for seed in range(arguments.seeds)]
    settings = Settings(num_images=arguments.num_images, num_train_images=0)
    rows = []
    nets = []
    for net, samplers in SAMPLERS.items():
        candidates = inputs.read_checkpoints(
            [str(folder / f"{net}-{seed}") for seed in range(arguments.seeds)]
        )
        cost = interval([of_seed[net] for of_seed in minutes], 1)
        for sampler, steps in itertools.product(samplers, arguments.steps):
            sampled_with = replace(settings, sampler=sampler, num_sample_steps=steps)
            report = evaluate.evaluate(candidates, sampled_with, bounds=False)
            scores = [score for result in report.results for score in result.drawn.scores]
            kids = [score.value for score in scores if score.name.startswith("KID")]
            rows.append([name, net, cost, sampler, str(steps), interval(kids, 4)])
            nets.append(candidates[0].sampled_with(report.results[0].drawn.sample))
    return rows, nets


def main() -> None:
    arguments = read(Arguments, __doc__, seeds=2, images=2560, num_images=30, steps=(1, 2))
    lines, shown = each({f"few_steps-{name}": partial(compare, arguments, name) for name in arguments.sets})
    how = f"KID (of emoji by lite0, else by a classifier) of {arguments.num_images} images, mean and 95 % interval of "
    how += f"{arguments.seeds} seeds (`PYTHONPATH=examples/consistency python benchmarks/few_steps.py`). "
    how += f"{tables.machine()}."
    names = "set", "net", "minutes", "sampler", "steps", "KID"
    tables.write(__file__, "One and two steps", how, "", *tables.table(names, lines), *shown)


if __name__ == "__main__":
    main()
