"""Show the runs in MLflow: ddpm ui [--port 5000]

Prints a link to the runs of each experiment. Then starts `mlflow ui` on ./mlflow.db, or on the SQLite file that
MLFLOW_TRACKING_URI names.
"""

import contextlib
import os
import signal
import subprocess
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
        raise UserError(
            f"{database} does not exist; training or `ddpm sync RUN` makes it, in the folder of that command"
        )
    address = without_password(uri) if database is None else f"http://127.0.0.1:{arguments.port}"
    with opened() as mlflow:
        experiments = mlflow.client.search_experiments()
    for experiment in experiments:
        print(
            f"{experiment.name:<12}{mlflow_pages.experiment_link(address, experiment.experiment_id)}",
            flush=True,
        )
    if database is not None:
        _serve(uri, arguments.port)


def _serve(uri: str, port: int) -> None:
    """Run `mlflow ui` until it ends, or until this process is interrupted or terminated.

    The server is in a session of its own: at Ctrl-C it gets SIGTERM, after which MLflow prints no traceback.
    """
    # For evaluating language models: seven processes, which print tracebacks at Ctrl-C (MLflow 3.17).
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    words = ["mlflow", "ui", "--backend-store-uri", uri, "--port", str(port), "--workers", "1"]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    server = subprocess.Popen([sys.executable, "-m", *words], start_new_session=True)
    try:
        code = server.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    sys.exit(code)
