"""The number of steps that images need: KID of few steps of each sampler, beside all steps of Algorithm 2.

    python benchmarks/samplers.py RUN [--num-images 500]

All start from the same noise, and are compared with the same held-out images by the features of a classifier
trained on the data. The table goes to benchmarks/samplers.md, the plot of quality over steps beside it; grids of the
sampled images go to a new temporary folder.
"""

import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from harness import tables
from harness.arguments import read
from matplotlib.figure import Figure

from ddpm.cluster.worker_pool import WorkerPool
from ddpm.evaluation import context
from ddpm.evaluation.features import features_of
from ddpm.evaluation.scores import Score, score
from ddpm.evaluation.settings import Settings
from ddpm.sampling.workers import SampleJob, SampleWorker
from ddpm.training.state import parameter_count
from ddpm.utils import images
from ddpm.utils.progress import Display

PIECE_IMAGES = 25


class Sampling(NamedTuple):
    """A sampling configuration."""

    sampler: str
    steps: int | None
    """None: all timesteps of the net."""
    eta: float = 0.0

    @property
    def name(self) -> str:
        """Its name without the number of steps."""
        return f"{self.sampler}, eta {self.eta:g}" if self.eta else self.sampler


BEST = Sampling("ddpm", None)
SAMPLINGS = (
    Sampling("dpmpp_2m", 5),
    Sampling("dpmpp_2m", 10),
    Sampling("dpmpp_2m", 20),
    Sampling("dpmpp_2m", 50),
    Sampling("dpmpp_2m", 10, eta=1.0),
    Sampling("dpmpp_2m", 20, eta=1.0),
    Sampling("dpmpp_2m", 50, eta=1.0),
    Sampling("heun", 10),
    Sampling("heun", 20),
    Sampling("ddim", 10),
    Sampling("ddim", 20),
    Sampling("ddim", 50),
    Sampling("ddpm", 50),
    BEST,
)


@dataclass(frozen=True)
class Arguments:
    """What to draw from."""

    checkpoint: tyro.conf.Positional[str]
    num_images: int = 500


def draw(candidate: context.Candidate, sampling: Sampling, n: int) -> np.ndarray:
    """Images uint8 [N, H, W, C]."""
    sample = replace(
        candidate.config.sample, sampler=sampling.sampler, num_sample_steps=sampling.steps, eta=sampling.eta
    )
    request = SampleJob(candidate.sampled_with(sample))
    pieces = [range(i, min(i + PIECE_IMAGES, n)) for i in range(0, n, PIECE_IMAGES)]
    done: dict[range, np.ndarray] = {}
    with (
        WorkerPool(partial(SampleWorker, request)) as pool,
        Display(f"{sampling.name} {sampling.steps}", n) as display,
    ):
        for piece, pixels in pool.map(SampleWorker.draw, pieces):
            done[piece] = pixels
            display.update(sum(map(len, done)))
    return np.concatenate([done[piece] for piece in pieces])


def main() -> None:
    arguments = read(Arguments, __doc__, num_images=30)
    (candidate,) = context.read([arguments.checkpoint])
    settings = Settings(num_images=2000, features="classifier", num_train_images=0)
    by = context.open_context([candidate], settings)
    found: dict[Sampling, Score] = {}
    grids = Path(tempfile.mkdtemp(prefix="samplers-"))
    for sampling in SAMPLINGS:
        drawn = draw(candidate, sampling, arguments.num_images)
        features = features_of(by.feature_net, torch.from_numpy(drawn))
        scores = score(by.feature_net.name, features, by.real, by.other_real)
        kid = next(s for s in scores if s.name.startswith("KID"))
        found[sampling] = kid
        print(f"{sampling.name} {sampling.steps}: {kid.name} {kid.value:.4f} +- {kid.error:.4f}", flush=True)
        grid = grids / f"{sampling.sampler}-{sampling.steps or 'all'}-eta-{sampling.eta:g}.png"
        grid.write_bytes(images.png_bytes(images.grid(drawn[:64])))
        print(f"grid        {grid}", flush=True)
    write(candidate, found)


def write(candidate: context.Candidate, found: dict[Sampling, Score]) -> None:
    """The table, as Markdown, and the plot."""
    best = found[BEST]
    seen, n = candidate.position["images_seen"], best.n
    T = candidate.config.schedule.num_timesteps
    how = (
        f"{best.name} of {n} images against {best.n_real} held-out ones of {candidate.config.data.source} (smaller "
        f"is better; real images have {best.floor:.4f} ± {best.floor_error:.4f}), from a net of this project with "
        f"{parameter_count(candidate.net):,} weights that has seen {seen:,} images "
        f"(`python benchmarks/samplers.py RUN --num-images {n}`). "
        f"{tables.machine()}."
    )
    names = ["sampler", "steps", best.name, f"from all {T} steps of ddpm"]
    rows = []
    for sampling, kid in found.items():
        apart, error = kid.value - best.value, (kid.error**2 + best.error**2) ** 0.5
        rows.append(
            [
                sampling.name,
                sampling.steps or T,
                f"{kid.value:.4f} ± {kid.error:.4f}",
                f"{apart:+.4f} ± {error:.4f}",
            ]
        )
    picture = "![KID over steps](samplers.png)"
    tables.write(__file__, "How many steps images need", how, "", *tables.table(names, rows), "", picture)

    figure = Figure((5, 3.4), layout="constrained")
    axes = figure.subplots()
    curves = defaultdict(list)
    for sampling, kid in found.items():
        curves[sampling.name].append((sampling.steps or T, kid.value, kid.error))
    for name, points in curves.items():
        axes.errorbar(*zip(*sorted(points), strict=True), marker="o", capsize=3, label=name)
    if best.floor is not None:
        axes.axhline(best.floor, color="grey", linewidth=1, label="real against real")
    axes.set_xscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel(best.name)
    axes.legend()
    file = tables.result(Path(__file__).with_suffix(".png"))
    figure.savefig(file, dpi=120)
    print(f"picture     {file}")


if __name__ == "__main__":
    main()
