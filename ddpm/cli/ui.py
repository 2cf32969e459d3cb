"""Show the runs in MLflow: ddpm ui [--port 5000]

Prints a link to the runs of each experiment. Then starts `mlflow ui` on ./mlflow.db, or on the SQLite file that
MLFLOW_TRACKING_URI names.
"""

import os
import sys
from dataclasses import dataclass

from ddpm.cli import parsing
from ddpm.config.tree import Port
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Where MLflow's pages are served."""

    port: Port = 5000
    """Port on this machine."""


def main() -> None:
    arguments: Arguments = parsing.parse(Arguments, __doc__)
    from ddpm.tracking import mlflow_pages
    from ddpm.tracking.mlflow_client import database_file, opened, tracking_uri, without_password

    uri = tracking_uri()
    database = database_file(uri)
    if database is not None and not database.exists():
        raise UserError(f"{database} does not exist; training makes it, in the folder in which it is started")
    address = without_password(uri) if database is None else f"http://127.0.0.1:{arguments.port}"
    with opened() as mlflow:
        experiments = mlflow.client.search_experiments()
    for experiment in experiments:
        print(
            f"{experiment.name:<12}{mlflow_pages.experiment_link(address, experiment.experiment_id)}",
            flush=True,
        )
    if database is not None:
        # For evaluating language models: seven processes, which print tracebacks at Ctrl-C (MLflow 3.17).
        os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        server = ["mlflow", "ui", "--backend-store-uri", uri, "--port", str(arguments.port), "--workers", "1"]
        os.execv(sys.executable, [sys.executable, "-m", *server])
