"""infra/mlflow/serve: a server on PostgreSQL and S3 with password authentication."""

import contextlib
from pathlib import Path

import boto3
import psutil
import pytest
from mlflow.entities import Run
from support import guarded, processes, servers, tracked

from ddpm.tracking.push import push
from ddpm.tracking.pusher import Delivery, Pusher

PASSWORD = "of-the-trainer-0"

pytestmark = pytest.mark.slow  # all tests, since their servers start slowly


@pytest.fixture(scope="module")
def trainer(guarded_mlflow: guarded.GuardedMlflowServer) -> dict[str, str]:
    """The environment of a user who may only train."""
    guarded_mlflow.add_user("trainer", PASSWORD)
    return guarded_mlflow.client_env("trainer", PASSWORD)


@pytest.mark.lowest
def test_access_needs_the_right_password(
    guarded_mlflow: guarded.GuardedMlflowServer, trainer: dict[str, str]
) -> None:
    assert guarded_mlflow.status() == 401
    assert guarded_mlflow.status("trainer", "guessed-0123456") == 401
    assert guarded_mlflow.status("trainer", PASSWORD) == 200


def test_a_missing_setting_is_an_error_with_its_name(tmp_path: Path) -> None:
    done = processes.run([processes.REPO / "infra/mlflow/serve"], cwd=tmp_path, env={"PGHOST": "db"})
    assert done.returncode == 2
    assert done.stderr.startswith("PGDATABASE is not set")


@pytest.fixture(scope="module")
def run(
    guarded_mlflow: guarded.GuardedMlflowServer,
    trainer: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A run, pushed by a trainer without credentials of S3."""
    run = tracked.write_run(tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in trainer.items():
            patch.setenv(variable, value)
        push(run)
        found = tracked.content(guarded_mlflow.uri, run)
        assert len(found["metrics"]["train/lr"]) == 4
        return tracked.run_with_key(guarded_mlflow.uri, run.key)


def test_a_run_is_in_postgresql_and_its_images_are_in_s3(
    run: Run, postgres: guarded.PostgresServer, s3_server: servers.S3Server
) -> None:
    with contextlib.closing(boto3.client("s3", **s3_server.client_options)) as client:
        files = client.list_objects_v2(Bucket="mlflow", Prefix="files/")["Contents"]
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert any(file["Key"].endswith(f"{run.info.run_id}/artifacts/pictures/noising.png") for file in files)
    status = f"SELECT status FROM runs WHERE run_uuid = '{run.info.run_id}'"
    assert postgres.execute(status, "mlflow") == [("FINISHED",)]


def test_no_secret_is_in_the_log_or_the_arguments(
    guarded_mlflow: guarded.GuardedMlflowServer, run: Run
) -> None:
    assert guarded_mlflow.process is not None
    parent = psutil.Process(guarded_mlflow.process.pid)
    arguments = [" ".join(process.cmdline()) for process in [parent, *parent.children(recursive=True)]]
    shown = "".join([guarded_mlflow.log.read_text(), *arguments])
    assert not [name for name, secret in guarded_mlflow.secrets.items() if secret in shown]


def test_a_wrong_password_is_one_line_without_it(
    guarded_mlflow: guarded.GuardedMlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = "not-the-password-0"
    for variable, value in guarded_mlflow.client_env("admin", wrong).items():
        monkeypatch.setenv(variable, value)
    pusher = Pusher(tracked.write_run(tmp_path))
    assert pusher.close() == Delivery(None, False)
    (line,) = tracked.warnings_of(caplog)
    assert "401" in line and "\n" not in line
    assert wrong not in caplog.text
