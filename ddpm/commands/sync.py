"""Deliver a run's remaining records to MLflow: python jobs/sync.py RUN [--timeout-s 60]

RUN is the folder or s3:// URI of a run. Records that MLflow did not accept are kept there; they go to the run's own
MLflow run at MLFLOW_TRACKING_URI. Running this twice, or while the run trains, logs nothing twice.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm import cli
from ddpm.config import Seconds


@dataclass(frozen=True)
class Arguments:
    """The run, and how long to try."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or s3:// URI of the run."""
    timeout_s: Seconds = 60.0
    """Give up after this many seconds without progress."""


def main() -> None:
    arguments: Arguments = cli.parse(Arguments, __doc__)
    from ddpm.tracking import sync
    from ddpm.tracking.mlflow_client import without_password
    from ddpm.utils.progress import Display, printable

    rest = sync.remaining(arguments.run)
    with Display("records", rest.records) as display:
        run_id = sync.deliver(rest, arguments.timeout_s, display.update)
    print(f"delivered   {rest.records:,} records")
    print(printable(f"MLflow      run {run_id} in {without_password(rest.address.uri)}"))
