"""Send a run, or a search with its trials, to MLflow: ddpm sync RUN [--timeout-s 60]

RUN is the folder or s3:// URI of a run. Sends what MLflow at MLFLOW_TRACKING_URI lacks to the run's own MLflow run,
and creates that run if there is none, as for a run that was trained with --run.tracking none. It may be repeated at any
time, also while the run trains, to any server.

RUN may also be the folder of a search: then table, comparison and best.json are made again from the trials, and
everything is sent.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm.cli import parsing
from ddpm.config.tree import Seconds

SEARCH = "search.json"
"""File of a search's folder (search/trials.py)."""


@dataclass(frozen=True)
class Arguments:
    """The run, and how long to try."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or s3:// URI of the run or search."""
    timeout_s: Seconds = 60.0
    """Give up after this many seconds in which MLflow accepted nothing."""


def main() -> None:
    arguments: Arguments = parsing.parse(Arguments, __doc__)
    from ddpm.runs import run_folder, storage
    from ddpm.tracking.pusher import push_patiently
    from ddpm.utils.progress import printable

    folder = storage.resolve(arguments.run)
    if run_folder.find_card(folder) is None and folder.child(SEARCH).exists():
        from ddpm.search import publish  # seconds: PyTorch

        for line in publish.sync(folder, arguments.timeout_s):
            print(printable(line))
        return
    pushed = push_patiently(run_folder.existing_run(arguments.run), arguments.timeout_s)
    print(f"sent        {pushed.num_points:,} points")
    print(printable(f"MLflow      run {pushed.run_id} in {pushed.uri}"))
