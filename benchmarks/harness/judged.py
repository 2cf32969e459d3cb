"""Quality over training time: how ours is trained for it, what was judged, the time to a value, the picture."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from harness import tables
from harness.comparison import command


@dataclass(frozen=True)
class Judged:
    """Weights during training, and the quality of images sampled from them."""

    name: str
    """The trainer, or the run."""
    images_seen: int
    minutes: float
    """Minutes of training."""
    processor_minutes: float
    """Minutes of all GPUs, or of all cores."""
    value: float
    """KID or FID."""
    error: float
    num_images: int
    how: str = ""
    """Metric and sampler, where a race has several."""


def train_command(preset: str, folder: Path, name: str, every: int) -> list[str]:
    """`jobs/train.py PRESET` into FOLDER/NAME, with a checkpoint every `every` images, all kept.

    It neither samples nor evaluates during training: that is not what is measured.
    """
    kept = ["--train.checkpoint-every-images", str(every), "--train.keep-checkpoints", "10000"]
    return command(preset, folder, name, *kept, "--train.held-out-images", "0")


def read_judged(file: Path) -> list[Judged]:
    return [Judged(**entry) for entry in json.loads(file.read_text())] if file.exists() else []


def write_judged(file: Path, judged: Sequence[Judged]) -> None:
    """Replace the file; a kill at any moment leaves the old one or the new one."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps([asdict(j) for j in judged], indent=1))
    part.rename(file)


def crossing(curve: Sequence[tuple[float, float]], value: float) -> float:
    """Minutes until a curve of (minutes, value) is at most `value`, interpolated linearly in both logarithms.

    inf: it never is.
    """
    before: tuple[float, float] | None = None
    for minutes, here in sorted(curve):
        here = max(here, 1e-6)
        if here <= value:
            if before is None:
                return minutes
            share = math.log(before[1] / value) / math.log(before[1] / here)
            return before[0] * (minutes / before[0]) ** share
        before = minutes, here
    return math.inf


def span(curve: Sequence[Judged], value: float, unit: float = 1.0) -> str:
    """`crossing` in units of so many minutes; in brackets, one standard error to each side."""
    middle, low, high = (
        crossing([(j.minutes, j.value + errors * j.error) for j in curve], value) / unit
        for errors in (0, -1, 1)
    )
    if math.isinf(middle):
        return f"> {curve[-1].minutes / unit:.1f}"
    if low == high:
        return f"{middle:.1f}"
    return (
        f"{middle:.1f} ({low:.1f} to {high:.1f})" if math.isfinite(high) else f"{middle:.1f} (from {low:.1f})"
    )


def picture(
    script: str,
    metric: str,
    curves: Mapping[str, Sequence[Judged]],
    lines: Sequence[float],
    unit: str = "minutes",
) -> None:
    """Write a plot of curves beside the script, with a dashed line at each of `lines`."""
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    scale = 60 if unit == "hours" else 1
    for name, curve in curves.items():
        minutes, value, error = np.array([(j.minutes, j.value, j.error) for j in curve]).T
        axes.errorbar(minutes / scale, value, error, marker="o", markersize=4, capsize=3, label=name)
    for line in lines:
        axes.axhline(line, color="grey", linewidth=1, linestyle="dashed")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.8 * min(*lines, 0.005 if metric.startswith("KID") else math.inf))
    axes.set_xlabel(f"{unit} of training")
    axes.set_ylabel(metric)
    axes.legend()
    path = tables.result(Path(script).with_suffix(".png"))
    figure.savefig(path, dpi=120)
    print(f"picture     {path}")
