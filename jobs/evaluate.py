"""Evaluate checkpoints: python jobs/evaluate.py CHECKPOINT [CHECKPOINT ...] [--num-images 2000] [--out FILE.json]

CHECKPOINT is the folder or s3:// URI of a checkpoint, or of a run (its newest checkpoint), or models:/NAME@ALIAS in
MLflow's registry. Bits/dim of held-out images, and KID, FID, precision, recall, density, coverage and memorisation of
generated images are printed as a table, written to FILE.json with plots next to it, and logged to the runs' own
MLflow runs. Settings that are not given default to those of training.
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
    """The images to compare with."""

    shards: str | None = None
    """Folder or s3:// URI of a data set. None: the training data set."""


@dataclass(frozen=True)
class Arguments:
    """Checkpoints, and how to evaluate them."""

    checkpoints: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CHECKPOINT [CHECKPOINT ...]")
    ]
    """Folders or URIs of checkpoints or runs."""
    data: Data = field(default_factory=Data)
    num_images: int = 2000
    """Images generated with each sampler, and the largest number of held-out images."""
    features: FeatureNetName | None = None
    """Feature net for comparing images. None: classifier if the data has classes, else lite0."""
    inception_weights: str | None = None
    """inception: file or URL of its weights. None: the file of torch-fidelity in torch.hub's folder."""
    all_checkpoints: bool = False
    """Evaluate every kept checkpoint of a run, not only the newest."""
    sampler: tuple[SamplerName, ...] = ()
    """One or several samplers; each is evaluated with each number of steps."""
    num_sample_steps: tuple[int, ...] = ()
    """One or several numbers of sampling steps."""
    spacing: Spacing | None = None
    """Which timesteps the steps visit: evenly in t, in sqrt(t), or in sigma^(1/7). auto: the sampler's default."""
    eta: float | None = None
    """ddim, dpmpp_2m: 0 is deterministic, 1 is as noisy as ddpm."""
    dynamic_threshold: float | None = None
    """Instead of clipping, dynamic thresholding at this quantile, such as 0.995."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guidance only where sigma is in (low, high]."""
    variance: Variance | None = None
    """Variance of p(x_{t-1} | x_t), in bits/dim and for the sampler ddpm. None: for bits/dim, learned if the net
    learned it, else measured on training images; for sampling, as in training."""
    num_train_images: int = 50_000
    """Memorisation: largest number of training images to search for the nearest neighbour. 0: no memorisation."""
    num_draws: int = 8
    """bits/dim: timesteps per image at which KL_t is measured, by importance sampling. 0: all timesteps."""
    seed: int = 0
    """Seed of generated images and of the bound's noise."""
    cache: str | None = None
    """Folder or s3:// URI for features of real images and the classifier. None: evaluation/ next to the shards."""
    num_workers: Annotated[int | None, tyro.conf.arg(aliases=["--workers"])] = None
    """Number of workers. None: all GPUs, or all cores if there are no GPUs, of this machine or of the Ray cluster at
    RAY_ADDRESS. The results do not depend on it."""
    out: str = "evaluation.json"
    """File or s3:// URI for all results with their n and uncertainty; plots are written next to it."""


CHANGES = "spacing eta dynamic_threshold guidance_scale guidance_interval".split()


def main() -> None:
    arguments: Arguments = cli.parse(Arguments, __doc__)
    if not arguments.checkpoints:
        raise UserError("no CHECKPOINT is given; expected folders or URIs of checkpoints or runs")
    from rich.console import Console

    from ddpm.evaluation import context, evaluate, publish, tables
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
    # A file or a pipe has no width.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(tables.tables(found, console.width))
    for line in (*tables.remarks(found, place.uri), *publish.store(found, place)):
        print(printable(line))


if __name__ == "__main__":
    cli.run(main)
