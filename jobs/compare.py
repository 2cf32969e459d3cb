"""Compare runs on one page: python jobs/compare.py RUN [RUN ...] [--out report.html] [--evaluations FILE.json ...]

RUN is the folder or s3:// URI of a run, or a run's id in MLflow. The page is one HTML file that needs no network:
settings that differ, ranks with ties, samples of equal seeds side by side, curves over images seen and over hours of
training, quality over sampling steps, trajectories, and the nearest training images. Curves and evaluations come from
MLflow at MLFLOW_TRACKING_URI, and from the records that a run has not delivered yet.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm import cli
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Runs, and where the page goes."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders or URIs of runs, or their ids in MLflow."""
    out: str = "report.html"
    """File or s3:// URI for the page."""
    evaluations: tuple[str, ...] = ()
    """Files or s3:// URIs that jobs/evaluate.py --out wrote, in addition to the evaluations in MLflow."""


def main() -> None:
    arguments: Arguments = cli.parse(Arguments, __doc__)
    if not arguments.runs:
        raise UserError("no RUN is given; expected folders or URIs of runs, or their ids in MLflow")
    from ddpm.evaluation import compared_run, comparison_page, publish
    from ddpm.utils.progress import printable

    place = publish.place_for(arguments.out, "report.html")
    found = compared_run.read(arguments.runs, arguments.evaluations)
    comparison_page.store(found, place)
    for run in found:
        for remark in run.remarks:
            print(printable(f"{run.name}: {remark}"))
    print(printable(f"comparison  {place.uri}"))


if __name__ == "__main__":
    cli.run(main)
