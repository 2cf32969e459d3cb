"""Few images: bits/dim, KID and memorisation with and without augmentation, after equal training.

    python benchmarks/few_images.py [--sets digits fashion-mnist emoji] [--counts 100 500] [--seeds 3]

A net sees so many images of a set, and is judged by others: the set's test images, or those of the emoji that are left.
The preset is `folder`, as for a user's own pictures. The share of memorised images is that of `jobs/evaluate.py`: those
nearer in pixels to a training image than 99 % of held-out images are. The table goes to benchmarks/few_images.md.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from harness import pictures, tables
from harness.arguments import read
from harness.comparison import STEPS, Measured, compare, each
from PIL import Image

from ddpm.data import prepare_for_run
from ddpm.data.sources import folder_preset as folder_preset


@dataclass(frozen=True)
class Arguments:
    """What to train, and how often."""

    sets: tuple[str, ...] = ("digits", "fashion-mnist", "emoji")
    counts: tuple[int, ...] = (100, 500)
    """Numbers of images to train on."""
    images: tuple[int, ...] = (25_600, 51_200)
    """Lengths of the trainings, in images seen."""
    seeds: int = 3
    num_images: int = 500
    """Images to sample from each net, and the largest number of held-out images."""


def write(name: str, count: int, held_out: int, folder: Path) -> Path:
    """Write so many images of a set as FOLDER/train, and others as FOLDER/test."""
    if name == "emoji":
        emoji = pictures.emoji()
        drawn = [emoji[i] for i in np.random.default_rng(0).permutation(len(emoji))[: count + held_out]]
        parts = {"train": drawn[:count], "test": drawn[count:]}
    else:
        source = prepare_for_run.source_named(name)
        counts = {"train": count, "test": min(held_out, source.splits["test"])}
        pixels = {split: source.read(split, 0, n)[0] for split, n in counts.items()}
        parts = {split: [Image.fromarray(np.squeeze(each, 2)) for each in pixels[split]] for split in counts}
    for split, images in parts.items():
        pictures.save(folder / split, images)
    return folder


def measure(arguments: Arguments, name: str, count: int, top: Path) -> Measured:
    """The rows of a set and a number of images, and the first seed's nets."""
    data = write(name, count, arguments.num_images, top / "images")
    model = folder_preset.preset(str(data)).model
    flags = f"--data.images {data} --model.channels {model.channels} --model.image-size {model.image_size}".split()
    choices = {
        f"{total:,} images seen, augment {augment:g}": [
            *flags,
            *f"--train.total-images {total} --data.augment {augment}".split(),
        ]
        for total in arguments.images
        for augment in (0.0, folder_preset.AUGMENT)
    }
    rows, nets = compare("folder", choices, top, arguments.seeds, arguments.num_images, count)
    return [[f"{count} of {name}", *row] for row in rows], nets


def main() -> None:
    smallest = {"sets": ("digits",), "counts": (60,), "images": (640,), "num_images": 30}
    arguments = read(Arguments, __doc__, seeds=2, **smallest)
    parts = itertools.product(arguments.sets, arguments.counts)
    lines, shown = each({f"few_images-{a}-{n}": partial(measure, arguments, a, n) for a, n in parts})
    how = (
        f"Held-out bits/dim, KID and memorised share of {arguments.num_images} images ({STEPS} steps of `dpmpp_2m`, "
        f"eta 1): mean and 95 % interval of {arguments.seeds} seeds (`python benchmarks/few_images.py`). "
        f"{tables.machine()}."
    )
    names = "images", "training", "bits/dim", "KID", "memorised", "minutes of training"
    tables.write(__file__, "Few images", how, "", *tables.table(names, lines), *shown)


if __name__ == "__main__":
    main()
