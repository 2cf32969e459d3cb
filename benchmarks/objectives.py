"""EDM and flow matching beside eps, x_0 and v: bits/dim and KID after equally many images.

    python benchmarks/objectives.py [--sets digits fashion-mnist emoji] [--seeds 3]

Each choice trains the net of the set's preset on the same images in the same order. Runs of one seed
follow each other, every other round backwards. All nets are sampled alike, each on its own schedule. The table, with
Student's 95 % intervals, goes to benchmarks/objectives.md, samples of the first seed beside it.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import tables
from harness.arguments import read
from harness.comparison import STEPS, Measured, compare, each, preset_of

CHOICES = {
    "eps": ("eps", "simple", "uniform"),
    "x_0": ("x_0", "simple", "uniform"),
    "v": ("v", "simple", "uniform"),
    "v, min-SNR": ("v", "min_snr", "uniform"),
    "v, min-SNR, gamma 25": ("v", "min_snr", "uniform", "--objective.min-snr-gamma=25"),
    "EDM": ("edm", "simple", "log_normal", "--schedule.kind=geometric"),
    "EDM on the preset's schedule": ("edm", "simple", "log_normal"),
    "flow matching": ("flow", "simple", "logit_normal", "--schedule.kind=straight"),
    "v as flow matching": ("v", "flow", "logit_normal", "--schedule.kind=straight"),
}
"""What is predicted, its weight and timesteps, and other flags; all else is the preset's."""


@dataclass(frozen=True)
class Arguments:
    """What to train, and how often."""

    sets: tuple[str, ...] = ("digits",)
    choices: tuple[str, ...] = tuple(CHOICES)
    seeds: int = 3
    images: int | None = None
    """Images to train on. None: the preset's."""
    num_images: int = 2000
    """Images to sample from each net, and held-out images."""


def main() -> None:
    arguments = read(Arguments, __doc__, choices=("flow matching",), seeds=2, images=640, num_images=30)
    length = [f"--train.total-images={arguments.images}"] if arguments.images else []
    flags = {}
    for choice in arguments.choices:
        predict, weight, timesteps, *more = CHOICES[choice]
        flags[choice] = [f"--objective.predict={predict}", f"--objective.weight={weight}"]
        flags[choice] += [f"--objective.timesteps={timesteps}", *more, *length]

    def measure(name: str, folder: Path) -> Measured:
        preset, common = preset_of(name, folder)
        choices = {choice: [*common, *flags[choice]] for choice in flags}
        rows, nets = compare(preset, choices, folder, arguments.seeds, arguments.num_images)
        return [[name, *row] for row in rows], nets

    lines, shown = each({f"objectives-{name}": partial(measure, name) for name in arguments.sets})
    how = (
        f"Held-out bits/dim and KID of {arguments.num_images} images ({STEPS} steps of `dpmpp_2m`, eta 1): mean and "
        f"95 % interval of {arguments.seeds} seeds (`python benchmarks/objectives.py`). {tables.machine()}."
    )
    names = "set", "choice", "bits/dim", "KID", "minutes of training"
    tables.write(__file__, "What the net predicts", how, "", *tables.table(names, lines), *shown)


if __name__ == "__main__":
    main()
