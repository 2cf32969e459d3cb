"""Deliver a run's remaining records to MLflow: python jobs/sync.py RUN [--timeout-s 60]

RUN is the folder or s3:// URI of a run. Records that MLflow did not accept are kept there; they go to the run's own
MLflow run at MLFLOW_TRACKING_URI. Running this twice, or while the run trains, logs nothing twice.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm import cli
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """The run, and how long to try."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or s3:// URI of the run."""
    timeout_s: float = 60.0
    """Give up after this many seconds without progress."""
    experiment: str | None = None
    """MLflow experiment of a run without a checkpoint. Otherwise the checkpoint names it."""


def main() -> None:
    arguments: Arguments = cli.parse(Arguments, __doc__)
    if not arguments.timeout_s > 0:
        raise UserError(f"--timeout-s is {arguments.timeout_s:g}; it must be above 0")
    from ddpm.tracking import mlflow_runs, uploader
    from ddpm.utils.progress import Display, printable

    kept = uploader.kept(arguments.run, arguments.experiment)
    with Display("records", kept.records) as display:
        done = uploader.deliver(kept, arguments.timeout_s, display.update)
    print(f"delivered   {kept.records:,} records")
    print(printable(f"MLflow      run {done.run_id} in {mlflow_runs.without_password(kept.address.uri)}"))


if __name__ == "__main__":
    cli.run(main)
