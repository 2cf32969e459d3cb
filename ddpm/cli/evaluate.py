"""Evaluate checkpoints: ddpm evaluate CHECKPOINT [CHECKPOINT ...] [--num-images 2000] [--out FILE.json]

CHECKPOINT is the folder or s3:// URI of a checkpoint or of a run (its newest checkpoint), models:/NAME@ALIAS in
MLflow's registry, or builtin:NAME. Measures bits/dim of held-out images, and KID, FID, precision, recall and
memorisation of generated images. The results are printed as a table and written to FILE.json, to the runs' folders
(evaluations/), and to MLflow; pictures of the images nearest to training images are beside the files. Other settings
default to those of training.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated

import tyro

from ddpm.cli import parsing
from ddpm.config.tree import NonEmptyStr, PositiveInt
from ddpm.evaluation.settings import Settings
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Checkpoints, and how to evaluate them."""

    checkpoints: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CHECKPOINT [CHECKPOINT ...]")
    ]
    """Folders or URIs of checkpoints or runs."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    all_checkpoints: bool = False
    """Evaluate every kept checkpoint of a run, not only the newest."""
    num_workers: Annotated[PositiveInt | None, tyro.conf.arg(aliases=["--workers"])] = None
    """Number of workers. None: all GPUs, or all cores if there are no GPUs, of this machine or of the Ray cluster at
    RAY_ADDRESS. The results do not depend on it."""
    out: NonEmptyStr = "evaluation.json"
    """File or s3:// URI for all results with their n and uncertainty; pictures are written next to it."""


def main() -> None:
    arguments: Arguments = parsing.parse(Arguments, __doc__)
    if not arguments.checkpoints:
        raise UserError("no CHECKPOINT is given; expected folders or URIs of checkpoints or runs")
    from ddpm.cluster import job_folder
    from ddpm.evaluation import evaluate, inputs, results_table, save_results
    from ddpm.utils.progress import printable

    job_folder.set_home()
    location = save_results.output_location(arguments.out)
    candidates = inputs.read_checkpoints(arguments.checkpoints, arguments.all_checkpoints)
    report = evaluate.evaluate(candidates, arguments.settings, arguments.num_workers)
    results_table.table(report).show()
    lines = chain(
        results_table.remarks(report, location.uri),
        save_results.to_file(report, location),
        save_results.to_runs(report),
    )
    for line in lines:
        print(printable(line))
