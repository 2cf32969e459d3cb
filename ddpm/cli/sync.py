"""Send a run to MLflow: ddpm sync RUN [--timeout-s 60]

RUN is the folder or s3:// URI of a run. Sends what MLflow at MLFLOW_TRACKING_URI lacks to the run's own MLflow run,
and creates that run if there is none, as for a run that was trained with --run.tracking none. It may be repeated at any
time, also while the run trains, to any server.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm.cli import parsing
from ddpm.config.tree import Seconds


@dataclass(frozen=True)
class Arguments:
    """The run, and how long to try."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or s3:// URI of the run."""
    timeout_s: Seconds = 60.0
    """Give up after this many seconds in which MLflow accepted nothing."""


def main() -> None:
    arguments: Arguments = parsing.parse(Arguments, __doc__)
    from ddpm.runs import run_folder
    from ddpm.tracking.pusher import push_patiently
    from ddpm.utils.progress import printable

    pushed = push_patiently(run_folder.existing_run(arguments.run), arguments.timeout_s)
    print(f"sent        {pushed.num_points:,} points")
    print(printable(f"MLflow      run {pushed.run_id} in {pushed.uri}"))
