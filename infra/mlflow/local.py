"""The server of `make mlflow` on a developer's machine: infra/mlflow/serve, with its own PostgreSQL and S3.

    MLFLOW_AUTH_ADMIN_PASSWORD=... make mlflow

PostgreSQL is Debian's (apt-get install postgresql), S3 is the server of the tests. Both listen on loopback only, and
keep their data in --folder until the next start. Ctrl-C ends all three.
"""

import contextlib
import os
import signal
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import boto3
import tyro
from support import guarded, servers


@dataclass(frozen=True)
class Arguments:
    """Folder and port of the server."""

    folder: Path = Path("runs/mlflow-server")
    """Folder of PostgreSQL's data, the buckets and the logs. For root it must be one that the user postgres may
    enter."""
    port: int = 5000
    """Port of MLflow."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    password = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")
    if len(password) < 12:
        print("MLFLOW_AUTH_ADMIN_PASSWORD must be set, to 12 characters or more", file=sys.stderr)
        return 2
    folder = arguments.folder.absolute()
    (folder / "s3/data/mini.options").unlink(missing_ok=True)  # would keep it to the ports of the last start
    s3 = servers.S3Server(folder / "s3", "mlflow", uuid.uuid4().hex)
    with s3, guarded.PostgresServer(folder / "postgres") as database:
        buckets = boto3.client("s3", **s3.client_options)
        if "mlflow" not in {bucket["Name"] for bucket in buckets.list_buckets()["Buckets"]}:
            buckets.create_bucket(Bucket="mlflow")
        files, port = "s3://mlflow/files", arguments.port
        with guarded.GuardedMlflowServer(folder, database, files, s3.client_env, port, password) as server:
            print(f"MLflow      {server.uri}, user admin; its log is {server.log}", flush=True)
            print(
                f"to train    export MLFLOW_TRACKING_URI={server.uri} MLFLOW_TRACKING_USERNAME=admin",
                flush=True,
            )
            print(
                "            and MLFLOW_TRACKING_PASSWORD; `infra/mlflow/add_user.py` adds users",
                flush=True,
            )
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    return 0


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.default_int_handler)
    sys.exit(main())
