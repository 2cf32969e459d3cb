"""Deliver to MLflow what a run could not: python jobs/track.py RUN [--timeout-s 60]

RUN is the folder or s3:// URI of a run. What was tracked while MLflow was away lies there; it goes to
MLFLOW_TRACKING_URI, into the run's own MLflow run. Done twice, or while the run goes on, it doubles nothing.
"""

from dataclasses import dataclass

import tyro
from ddpm.utils.errors import UserError

from ddpm import cli


@dataclass(frozen=True)
class Arguments:
    """Whose records, and how long to try."""

    run: tyro.conf.Positional[str]
    timeout_s: float = 60.0
    """Seconds without progress after which it gives up."""
    experiment: str | None = None
    """MLflow experiment of a run that has no checkpoint yet; else the checkpoint says so."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
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
