"""Judge checkpoints: python jobs/evaluate.py CHECKPOINT [CHECKPOINT ...] [--num-images 2000] [--out FILE.json]

CHECKPOINT is the folder or s3:// URI of a checkpoint or of a run (its newest), or models:/NAME@ALIAS of MLflow's
registry. Bits/dim of held-out images, and KID, FID, precision, recall, density, coverage and memorisation of drawn
ones, become a table, FILE.json, pictures beside it, and points in the runs' own MLflow runs. What is not given is as in
training.
"""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ddpm import cli
from ddpm.config import FeatureNetName, SamplerName, Spacing, Variance
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Data:
    """What to judge by."""

    shards: str | None = None
    """Folder or s3:// URI of a data set; None: the one that was trained on."""


@dataclass(frozen=True)
class Arguments:
    """What to judge, and how."""

    checkpoints: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CHECKPOINT [CHECKPOINT ...]")
    ]
    data: Data = field(default_factory=Data)
    num_images: int = 2000
    """Images drawn with each sampler, and held-out images at most."""
    features: FeatureNetName | None = None
    """The net by whose features images are compared; None: classifier where the data has classes, else lite0."""
    inception_weights: str | None = None
    """inception: file or URL of its weights; None: where torch-fidelity keeps them."""
    all_checkpoints: bool = False
    """Of a run not the newest checkpoint, but each that it has kept."""
    sampler: tuple[SamplerName, ...] = ()
    """One or several; each is judged with each number of steps."""
    num_sample_steps: tuple[int, ...] = ()
    spacing: Spacing | None = None
    """Which timesteps the steps visit: evenly in t, in sqrt(t), or in sigma^(1/7); auto: what suits the sampler."""
    eta: float | None = None
    """ddim, dpmpp_2m: 0 is deterministic, 1 as noisy as ancestral."""
    dynamic_threshold: float | None = None
    """Instead of clipping, dynamic thresholding at this quantile, as 0.995."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guidance only where sigma is above the first and not above the second."""
    variance: Variance | None = None
    """Variance of p(x_{t-1} | x_t) in bits/dim and with the sampler ancestral. None: in bits/dim learned where the net
    learned it, else measured on training images; in drawing as in training."""
    num_train_images: int = 50_000
    """Memorisation: training images among which the nearest one of a drawn image is searched for, at most; 0: none."""
    num_draws: int = 8
    """bits/dim: timesteps of an image at which KL_t is measured, drawn where it matters; 0: all."""
    seed: int = 0
    cache: str | None = None
    """Folder or s3:// URI for features of real images and the classifier; None: evaluation/ beside the shards."""
    num_workers: int | None = None
    """None: all GPUs, or else cores, of this machine or of the Ray cluster that RAY_ADDRESS names. The numbers are the
    same."""
    out: str = "evaluation.json"
    """File or s3:// URI for every number with its n and uncertainty; a picture is written beside it."""


CHANGES = "spacing eta dynamic_threshold guidance_scale guidance_interval".split()


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if not arguments.checkpoints:
        raise UserError("no CHECKPOINT is given; expected folders or URIs of checkpoints or runs")
    from rich.console import Console

    from ddpm.evaluation import context, evaluate, publish, report
    from ddpm.utils.progress import printable

    place = publish.place_for(arguments.out)
    settings = context.Settings(
        num_images=arguments.num_images,
        features=arguments.features,
        inception_weights=arguments.inception_weights,
        samplers=arguments.sampler,
        num_sample_steps=arguments.num_sample_steps,
        sample={name: value for name in CHANGES if (value := getattr(arguments, name)) is not None},
        variance=arguments.variance or "auto",
        num_train_images=arguments.num_train_images,
        num_draws=arguments.num_draws,
        seed=arguments.seed,
        shards=arguments.data.shards,
        cache=arguments.cache,
    )
    candidates = context.read(arguments.checkpoints, arguments.all_checkpoints)
    found = evaluate.evaluate(candidates, settings, arguments.num_workers)
    # A file or a pipe is as wide as it takes.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(report.tables(found, console.width))
    for line in (*report.remarks(found, place.uri), *publish.store(found, place)):
        print(printable(line))


if __name__ == "__main__":
    cli.run(main)
