"""Draw digits from noise into docs/noise-to-digits.gif: python docs/animation.py [--out FILE]

`python jobs/sample.py builtin:digits --trajectory` writes such a GIF of eight images; this one is a wide grid.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

import ddpm
from ddpm.sampling import generate
from ddpm.utils import images

GREY_STEP = 17
"""Frames have 16 grey levels, as the digits of scikit-learn have 17: with 256 the file would be twice as large."""
HELD_FRAMES = 25
"""Frames for which the finished images stay."""


@dataclass(frozen=True)
class Arguments:
    """Where the animation goes, and what it shows."""

    out: Path = Path(__file__).parent / "noise-to-digits.gif"
    """The file."""
    columns: int = 16
    """Images in a row."""
    rows: int = 3
    """Rows of images."""
    num_sample_steps: int = 50
    """Sampling steps, each of which is a frame."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    trained = ddpm.Run("builtin:digits").trained
    sample = replace(trained.config.sample, num_sample_steps=arguments.num_sample_steps)
    indices = range(arguments.columns * arguments.rows)
    *frames, finished = generate.denoising(trained.sampled_with(sample), indices)
    coarse = [np.rint(frame / GREY_STEP) * GREY_STEP for frame in [*frames, *[finished] * HELD_FRAMES]]
    grids = [images.grid(frame.astype(np.uint8), arguments.columns) for frame in coarse]
    arguments.out.write_bytes(images.gif_bytes(grids))
    print(f"{arguments.out}  {arguments.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
