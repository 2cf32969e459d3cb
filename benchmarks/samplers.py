"""The number of steps that images need: KID of few steps of each sampler, beside all steps of Algorithm 2.

    python benchmarks/samplers.py RUN [--num-images 500] [--judges classifier lite0]

All start from the same noise, and are compared with the same held-out images by the features of a classifier
trained on the data, and by those of lite0, which also see noise of a few grey levels. The table goes to
benchmarks/samplers.md, the plot of quality over steps beside it; grids of the sampled images go to a new temporary
folder.
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

from ddpm.config.tree import FeatureNetName
from ddpm.evaluation import inputs
from ddpm.evaluation.feature_scores import score_features
from ddpm.evaluation.features import features_of
from ddpm.evaluation.settings import Settings
from ddpm.runs.evaluations import Score
from ddpm.sampling.pool import WorkerPool
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
    sigma_min: float = 0.0

    @property
    def name(self) -> str:
        """Its name without the number of steps."""
        values = {"eta": self.eta, "sigma_min": self.sigma_min}
        return ", ".join([self.sampler, *(f"{key} {value:g}" for key, value in values.items() if value)])


BEST = Sampling("ddpm", None)
SAMPLINGS = (
    Sampling("dpmpp_2m", 5),
    Sampling("dpmpp_2m", 10),
    Sampling("dpmpp_2m", 20),
    Sampling("dpmpp_2m", 50),
    Sampling("dpmpp_2m", 10, eta=1.0),
    Sampling("dpmpp_2m", 20, eta=1.0),
    Sampling("dpmpp_2m", 50, eta=1.0),
    *(Sampling("dpmpp_2m", 20, 1.0, sigma_min) for sigma_min in (0.02, 0.04, 0.08, 0.12)),
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
    judges: tuple[FeatureNetName, ...] = ("classifier", "lite0")
    """Feature nets of KID."""


def draw(candidate: inputs.Candidate, sampling: Sampling, n: int) -> np.ndarray:
    """Images uint8 [N, H, W, C]."""
    of_sampling = {"sampler": sampling.sampler, "num_sample_steps": sampling.steps, "eta": sampling.eta}
    sample = replace(candidate.config.sample, **of_sampling, sigma_min=sampling.sigma_min)
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
    (candidate,) = inputs.read_checkpoints([arguments.checkpoint])
    contexts = [
        inputs.prepare_reference([candidate], Settings(num_images=2000, features=judge, num_train_images=0))
        for judge in arguments.judges
    ]
    found: dict[Sampling, list[Score]] = {}
    grids = Path(tempfile.mkdtemp(prefix="samplers-"))
    for sampling in SAMPLINGS:
        drawn = draw(candidate, sampling, arguments.num_images)
        found[sampling] = [kid_of(drawn, by) for by in contexts]
        print(f"{sampling.name} {sampling.steps}: {', '.join(map(shown, found[sampling]))}", flush=True)
        grid = grids / f"{sampling.name.replace(', ', '-').replace(' ', '-')}-{sampling.steps or 'all'}.png"
        grid.write_bytes(images.png_bytes(images.grid(drawn[:64])))
        print(f"grid        {grid}", flush=True)
    write(candidate, found)


def kid_of(drawn: np.ndarray, by: inputs.Reference) -> Score:
    """KID of drawn images, with that of real ones as the floor."""
    features = features_of(by.feature_net, torch.from_numpy(drawn))
    scores = score_features(by.feature_net.name, features, by.real, by.other_real)
    return next(s for s in scores if s.name.startswith("KID"))


def shown(kid: Score) -> str:
    return f"{kid.value:.4f} ± {kid.error:.4f}"


def write(candidate: inputs.Candidate, found: dict[Sampling, list[Score]]) -> None:
    """The table, as Markdown, and the plot."""
    best = found[BEST]
    seen = candidate.state["images_seen"]
    n = best[0].n
    T = candidate.config.schedule.num_timesteps
    floors = ", ".join(f"{kid.floor:.4f} ± {kid.floor_error:.4f}" for kid in best)
    how = (
        f"KID of {n} images against {best[0].n_real} held-out ones of {candidate.config.data.source} (smaller is "
        f"better; real images have {floors}), from a net of this project with {parameter_count(candidate.net):,} "
        f"weights that has seen {seen:,} images (`python benchmarks/samplers.py RUN --num-images {n}`). "
        f"{tables.machine()}."
    )
    names = ["sampler", "steps", *(kid.name for kid in best)]
    rows = [[sampling.name, sampling.steps or T, *map(shown, kids)] for sampling, kids in found.items()]
    picture = "![KID over steps](samplers.png)"
    tables.write(__file__, "How many steps images need", how, "", *tables.table(names, rows), "", picture)

    figure = Figure((5 * len(best), 3.4), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, len(best), squeeze=False)[0]):
        curves = defaultdict(list)
        for sampling, kids in found.items():
            if not sampling.sigma_min:
                curves[sampling.name].append((sampling.steps or T, kids[i].value, kids[i].error))
        for name, points in curves.items():
            axes.errorbar(*zip(*sorted(points), strict=True), marker="o", capsize=3, label=name)
        axes.axhline(best[i].floor, color="grey", linewidth=1, label="real against real")
        axes.set_xscale("log")
        axes.set_xlabel("steps")
        axes.set_ylabel(best[i].name)
        axes.legend()
    file = tables.result(Path(__file__).with_suffix(".png"))
    figure.savefig(file, dpi=120)
    print(f"picture     {file}")


if __name__ == "__main__":
    main()
