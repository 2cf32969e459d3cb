"""infra/mlflow/serve for tests: MLflow on PostgreSQL and S3, with password authentication."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psycopg
import requests

from support.processes import REPO, program, run
from support.servers import LOOPBACK, Server, free_ports

AS_POSTGRES: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []}
if os.geteuid():
    AS_POSTGRES = {}


class PostgresServer(Server):
    """PostgreSQL with a role and a database `mlflow`; `client_env` is what its clients need.

    PostgreSQL refuses to run as root: started by root, it runs as Debian's user postgres. Only this object has the
    role's password: it is set through the socket, which no other user can reach.
    """

    stop_signal = signal.SIGINT  # SIGTERM would wait for the clients

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        postgres, initdb = (postgres_program(name) for name in ("postgres", "initdb"))
        # Short, since the path of a socket has at most 107 characters; separate, since no other user may enter it.
        self.socket_dir = Path("/tmp", f"postgres-{uuid.uuid4().hex[:12]}")
        data = folder / "data"
        data.mkdir(mode=0o700, parents=True)
        if AS_POSTGRES:
            shutil.chown(data, "postgres", "postgres")
        words = [initdb, "--pgdata", str(data), "--username", "postgres", "--encoding", "UTF8"]
        words += ["--locale", "C", "--auth-local", "trust", "--auth-host", "scram-sha-256", "--no-sync"]
        done = subprocess.run(words, cwd="/", capture_output=True, text=True, **AS_POSTGRES)
        if done.returncode:
            raise RuntimeError(f"initdb cannot make {data}:\n{done.stderr}")
        whose = {"PGUSER": "mlflow", "PGDATABASE": "mlflow", "PGPASSWORD": uuid.uuid4().hex}
        self.client_env = {"PGHOST": LOOPBACK, "PGPORT": str(port), **whose}
        command = [postgres, "-D", str(data), "-h", LOOPBACK, "-p", str(port), "-k", str(self.socket_dir)]
        super().__init__("postgres", command, f"postgresql://{LOOPBACK}:{port}", folder, **AS_POSTGRES)

    def is_up(self) -> bool:
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def start(self, timeout_s: float = 300) -> Self:
        self.socket_dir.mkdir(mode=0o700, exist_ok=True)
        if AS_POSTGRES:
            shutil.chown(self.socket_dir, "postgres", "postgres")
        super().start(timeout_s)
        self.execute(f"CREATE ROLE mlflow LOGIN PASSWORD '{self.client_env['PGPASSWORD']}'")
        self.execute("CREATE DATABASE mlflow OWNER mlflow")
        return self

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Execute `statement` as the superuser; returns its rows."""
        address = {"host": str(self.socket_dir), "port": self.client_env["PGPORT"]}
        with psycopg.connect(**address, user="postgres", dbname=database, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def stop(self, grace_s: float = 10) -> None:
        super().stop(grace_s)
        shutil.rmtree(self.socket_dir, ignore_errors=True)


class GuardedMlflowServer(Server):
    """infra/mlflow/serve: runs in PostgreSQL, files at the s3:// URI `files`, password authentication."""

    def __init__(
        self,
        folder: Path,
        database: PostgresServer,
        files: str,
        s3_env: Mapping[str, str],
        host: str = LOOPBACK,
    ) -> None:
        (self.port,) = free_ports(1)
        self.uri = f"http://{LOOPBACK}:{self.port}"
        self.admin_password = uuid.uuid4().hex
        path = os.pathsep.join([str(Path(program("mlflow")).parent), os.environ["PATH"]])
        env = {
            **database.client_env,
            **s3_env,
            "PATH": path,
            "MLFLOW_ARTIFACTS_DESTINATION": files,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.admin_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": uuid.uuid4().hex,
            "MLFLOW_HOST": host,
            "MLFLOW_PORT": str(self.port),
            "MLFLOW_WORKERS": "1",
        }
        super().__init__("mlflow", [str(REPO / "infra/mlflow/serve")], f"{self.uri}/health", folder, env)

    def client_env(self, user: str = "admin", password: str | None = None) -> dict[str, str]:
        """Environment of a client that logs in as `user`."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password or self.admin_password,
        }

    @property
    def secrets(self) -> dict[str, str]:
        """The settings that nobody may see."""
        names = ("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")
        return {name: self.env[name] for name in names}

    def status(self, *user_and_password: str) -> int:
        """The HTTP status of a request for the experiments."""
        url = f"{self.uri}/api/2.0/mlflow/experiments/search?max_results=1"
        return requests.get(url, auth=user_and_password or None, timeout=120).status_code

    def add_user(self, name: str, password: str) -> None:
        """Add a user as the admin, as docs/recipes/operate.md says."""
        client = f"get_app_client('basic-auth', tracking_uri={self.uri!r})"
        code = f"from mlflow.server import get_app_client; {client}.create_user({name!r}, {password!r})"
        done = run([sys.executable, "-c", code], cwd=self.folder, env=self.client_env())
        assert done.returncode == 0, done.stderr


def postgres_program(name: str) -> str:
    """Path of a program of PostgreSQL: Debian's newest version, or the one on the PATH.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    path = str(found[-1]) if found else shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} is not installed; `apt-get install postgresql` brings it")
    return path
