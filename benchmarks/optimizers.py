"""Muon beside AdamW, each at its best learning rate: bits/dim and KID after the same images, and after the same time.

    python benchmarks/optimizers.py [--sets digits fashion-mnist emoji] [--seeds 3]

The learning rate of each is the one with the lowest held-out bits/dim of one seed; nets are then trained and sampled
as objectives.py does. The same time: AdamW's steps are shorter, so it has as many more images as it trains faster, by
the images/s of those runs. No preset was tuned on the emoji, those of Debian's package fonts-noto-color-emoji, 32x32 on
white, which the preset fashion-mnist trains in colour. The table goes to benchmarks/optimizers.md.
"""

import io
import math
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fontTools.ttLib import TTFont
from harness import tables
from harness.arguments import read
from objectives import STEPS, compare, train
from PIL import Image

from ddpm.storage import locations
from ddpm.tracking import curves

EMOJI = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SETS = {
    "digits": ("digits", 48_000),
    "fashion-mnist": ("fashion-mnist", 25_600),
    "emoji": ("fashion-mnist", 25_600),
}
"""Preset, and images of a training."""
KINDS = {"AdamW": "adamw", "Muon": "muon"}


@dataclass(frozen=True)
class Arguments:
    """What to train, and how often."""

    sets: tuple[str, ...] = ("digits", "fashion-mnist")
    lrs: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 16e-3)
    """Learning rates among which each optimizer's is searched."""
    seeds: int = 3
    images: int | None = None
    """Images to train on. None: as many as fit into two minutes (SETS)."""
    num_images: int = 2000
    """Images to sample from each net, and held-out images."""


def write_emoji(folder: Path) -> None:
    """Write each emoji of EMOJI as a PNG of 32x32 pixels."""
    folder.mkdir()
    for strike in TTFont(EMOJI)["CBDT"].strikeData:
        for name, glyph in strike.items():
            emoji = Image.open(io.BytesIO(glyph.imageData)).convert("RGBA")
            side = max(emoji.size)
            page = Image.new("RGBA", (side, side), "white")
            page.alpha_composite(emoji, ((side - emoji.width) // 2, (side - emoji.height) // 2))
            page.convert("RGB").resize((32, 32), Image.Resampling.BOX).save(folder / f"{name}.png")


def searched(preset: str, folder: Path, name: str, *flags: str) -> tuple[float, float]:
    """Held-out bits/dim at the end of a training, infinite if it failed, and its images/s."""
    try:
        train(preset, folder, name, None, *flags, "--cluster.max-failures", "0")
    except subprocess.CalledProcessError:
        return math.inf, math.nan
    curve = curves.read(locations.resolve(str(folder / name)))
    speed = statistics.median(point.value for point in curve["train/images_per_s"])
    return curve["held_out/bits_per_dim"][-1].value, speed


def measure(arguments: Arguments, data: str, folder: Path) -> list[list[str]]:
    preset, images = SETS[data][0], arguments.images or SETS[data][1]
    common = ["--cluster.num-workers", "2"]
    if data == "emoji":
        write_emoji(folder / "emoji")
        common += ["--data.images", str(folder / "emoji"), "--model.channels", "3"]
    choices, speeds = dict[str, list[str]](), list[float]()
    for name, kind in KINDS.items():
        found = {}
        for lr in arguments.lrs:
            flags = [
                *common,
                "--optim.kind",
                kind,
                "--optim.lr",
                str(lr),
                "--train.total-images",
                str(images),
            ]
            found[lr] = (*searched(preset, folder, f"{kind}-{lr}", *flags), flags)
        print(data, name, {lr: values[:2] for lr, values in found.items()}, flush=True)
        lr = min(found, key=lambda lr: found[lr][0])
        speeds.append(found[lr][1])
        choices[f"{name}, learning rate {lr:g}"] = found[lr][2]
    share = speeds[0] / speeds[1]
    for_as_long = [*next(iter(choices.values())), "--train.total-images", str(round(images * share))]
    choices[f"AdamW, {share:.2f} times the images"] = for_as_long
    rows = compare(preset, choices, folder, arguments.seeds, None, arguments.num_images)
    return [[f"{data}, {images:,} images", *row] for row in rows]


def main() -> None:
    arguments = read(Arguments, __doc__, sets=("digits",), lrs=(2e-3,), seeds=2, images=640, num_images=30)
    lines = list[list[str]]()
    for data in arguments.sets:
        with tempfile.TemporaryDirectory() as folder:
            lines += measure(arguments, data, Path(folder))
    searched = ", ".join(f"{lr:g}" for lr in arguments.lrs)
    how = (
        f"Held-out bits/dim and KID of {arguments.num_images} images ({STEPS} steps of `dpmpp_2m`, eta 1): mean and "
        f"95 % interval of {arguments.seeds} seeds, each optimizer at the best learning rate of {searched} "
        f"(`python benchmarks/optimizers.py`). {tables.machine()}."
    )
    names = "data", "optimizer", "bits/dim", "KID", "minutes of training"
    tables.write(__file__, "Muon beside AdamW", how, "", *tables.table(names, lines))


if __name__ == "__main__":
    main()
