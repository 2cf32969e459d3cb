"""The number of steps that images need: KID of few steps of each sampler, beside all steps of Algorithm 2.

    python benchmarks/samplers.py RUN [--num-images 500]

All ways start from the same noise, and are compared with the same held-out images by the features of a classifier
trained on the data. The table goes to benchmarks/samplers.md, the plot of quality over steps beside it; grids of the
sampled images go to the working folder.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from harness import tables
from matplotlib.figure import Figure

from ddpm.cluster.worker_pool import WorkerPool
from ddpm.evaluation import context
from ddpm.evaluation.features import features_of
from ddpm.evaluation.scores import Score, score
from ddpm.sampling.workers import SampleJob, SampleWorker
from ddpm.training.state import parameter_count
from ddpm.utils import images
from ddpm.utils.progress import Display

PIECE_IMAGES = 25
ALL = 1000


class Way(NamedTuple):
    """A way of sampling."""

    sampler: str
    steps: int
    eta: float = 0.0

    @property
    def name(self) -> str:
        """Its name without the number of steps."""
        return f"{self.sampler}, eta {self.eta:g}" if self.eta else self.sampler


BEST = Way("ddpm", ALL)
WAYS = (
    Way("dpmpp_2m", 5),
    Way("dpmpp_2m", 10),
    Way("dpmpp_2m", 20),
    Way("dpmpp_2m", 50),
    Way("dpmpp_2m", 10, eta=1.0),
    Way("dpmpp_2m", 20, eta=1.0),
    Way("dpmpp_2m", 50, eta=1.0),
    Way("heun", 10),
    Way("heun", 20),
    Way("ddim", 10),
    Way("ddim", 20),
    Way("ddim", 50),
    Way("ddpm", 50),
    BEST,
)


@dataclass(frozen=True)
class Arguments:
    """What to draw from."""

    checkpoint: tyro.conf.Positional[str]
    num_images: int = 500


def draw(candidate: context.Candidate, way: Way, n: int) -> np.ndarray:
    """Images uint8 [N, H, W, C]."""
    sample = replace(candidate.config.sample, sampler=way.sampler, num_sample_steps=way.steps, eta=way.eta)
    request = SampleJob(candidate.net.state_dict(), replace(candidate.config, sample=sample))
    pieces = [range(i, min(i + PIECE_IMAGES, n)) for i in range(0, n, PIECE_IMAGES)]
    done: dict[range, np.ndarray] = {}
    with WorkerPool(partial(SampleWorker, request)) as pool, Display(f"{way.name} {way.steps}", n) as display:
        for piece, pixels in pool.map(SampleWorker.draw, pieces):
            done[piece] = pixels
            display.update(sum(map(len, done)))
    return np.concatenate([done[piece] for piece in pieces])


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    (candidate,) = context.read([arguments.checkpoint])
    settings = context.Settings(num_images=2000, features="classifier", num_train_images=0)
    by = context.choose([candidate], settings)
    found: dict[Way, Score] = {}
    for way in WAYS:
        drawn = draw(candidate, way, arguments.num_images)
        features = features_of(by.feature_net, torch.from_numpy(drawn))
        scores = score(by.feature_net.name, features, by.real, by.other_real)
        kid = next(s for s in scores if s.name.startswith("KID"))
        found[way] = kid
        print(f"{way.name} {way.steps}: {kid.name} {kid.value:.4f} +- {kid.error:.4f}", flush=True)
        grid = Path(f"samplers-{way.sampler}-{way.steps}-eta-{way.eta:g}.png")
        grid.write_bytes(images.png_bytes(images.grid(drawn[:64])))
        print(f"grid        {grid.absolute()}", flush=True)
    write(candidate, found)


def write(candidate: context.Candidate, found: dict[Way, Score]) -> None:
    """The table, as Markdown, and the plot."""
    best = found[BEST]
    seen, n = candidate.position["images_seen"], best.n
    how = (
        f"{best.name} of {n} images against {best.n_real} held-out ones of {candidate.config.data.source} (smaller "
        f"is better; real images have {best.floor:.4f} ± {best.floor_error:.4f}), from a net of this project with "
        f"{parameter_count(candidate.net):,} weights that has seen {seen:,} images "
        f"(`python benchmarks/samplers.py RUN --num-images {n}`). "
        f"{tables.machine()}."
    )
    names = ["sampler", "steps", best.name, f"from all {ALL} steps of ddpm"]
    rows = []
    for way, kid in found.items():
        apart, error = kid.value - best.value, (kid.error**2 + best.error**2) ** 0.5
        rows.append(
            [way.name, way.steps, f"{kid.value:.4f} ± {kid.error:.4f}", f"{apart:+.4f} ± {error:.4f}"]
        )
    picture = "![KID over steps](samplers.png)"
    tables.write(__file__, "How many steps images need", how, "", *tables.table(names, rows), "", picture)

    figure = Figure((5, 3.4), layout="constrained")
    axes = figure.subplots()
    curves = defaultdict(list)
    for way, kid in found.items():
        curves[way.name].append((way.steps, kid.value, kid.error))
    for name, points in curves.items():
        axes.errorbar(*zip(*sorted(points), strict=True), marker="o", capsize=3, label=name)
    if best.floor is not None:
        axes.axhline(best.floor, color="grey", linewidth=1, label="real against real")
    axes.set_xscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel(best.name)
    axes.legend()
    file = Path(__file__).with_suffix(".png")
    figure.savefig(file, dpi=120)
    print(f"picture     {file}")


if __name__ == "__main__":
    main()
