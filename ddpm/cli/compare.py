"""Compare runs: ddpm compare RUN [RUN ...] [--out report.html] [--evaluations FILE.json ...]

RUN is the folder or s3:// URI of a run, models:/NAME@ALIAS in MLflow's registry, or builtin:NAME. The answer is
printed: which net is better. Runs that differ in their seeds alone are one configuration; with three or more of each,
the answer is which configuration is better. The page is one HTML file that needs no network. It shows the answer,
samples of equal seeds side by side, settings that differ, ranks with ties, and curves. It reads the runs' folders; a
run without samples is sampled.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm.cli import parsing
from ddpm.config.tree import NonEmptyStr
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Runs, and where the page goes."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders or URIs of runs, registered models or built-in nets."""
    out: NonEmptyStr = "report.html"
    """File or s3:// URI for the page."""
    evaluations: tuple[str, ...] = ()
    """Files or s3:// URIs that ddpm evaluate --out wrote, in addition to the evaluations in the runs' folders."""


def main() -> None:
    arguments: Arguments = parsing.parse(Arguments, __doc__)
    if not arguments.runs:
        raise UserError("no RUN is given; expected folders or URIs of runs, or builtin:NAME")
    from ddpm.cluster import job_folder
    from ddpm.evaluation import compared_run, comparison, comparison_page, save_results
    from ddpm.utils.progress import printable

    job_folder.set_home()
    location = save_results.output_location(arguments.out)
    runs = compared_run.read(arguments.runs, arguments.evaluations, sample=True)
    save_results.write(location, comparison_page.render(runs))
    for line in comparison.lines(comparison.compare(runs)):
        print(printable(line))
    print(printable(f"comparison  {location.uri}"))
