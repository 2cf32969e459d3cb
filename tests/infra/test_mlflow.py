"""infra/mlflow: a server on PostgreSQL and S3 with password authentication, and its pages in a browser."""

import contextlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import mlflow
import psutil
import pytest
import requests
from mlflow.entities import Run
from playwright.sync_api import Error
from support import guarded, leaks, processes, servers, tracked

PASSWORD = "of-whoever-trains-0"
SHORT = {
    "train.total-images": 1280,
    "train.log-every-images": 256,
    "train.checkpoint-every-images": 1280,
    "train.sample-every-images": 1280,
    "sample.num-sample-steps": 5,
    "model.base-width": 16,
    "run.name": "trained",
    "run.storage": "s3://trained/runs",
}
PATIENCE_MS = 60_000

pytestmark = pytest.mark.slow  # all tests, since their servers start slowly


def get(server: guarded.GuardedMlflowServer, user: str | None, password: str = PASSWORD) -> int:
    """The HTTP status of a request for the experiments."""
    auth = (user, password) if user else None
    url = f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    return requests.get(url, auth=auth, timeout=30).status_code


@pytest.fixture(scope="session")
def trainer(guarded_mlflow: guarded.GuardedMlflowServer) -> dict[str, str]:
    """The environment of a user who may only train."""
    done = guarded_mlflow.add_user("trainer", PASSWORD)
    assert (done.returncode, done.stdout) == (0, "trainer may log in\n"), done.stderr
    return guarded_mlflow.client_env("trainer", PASSWORD)


def test_access_needs_the_right_password(
    guarded_mlflow: guarded.GuardedMlflowServer, trainer: dict[str, str]
) -> None:
    statuses = [get(guarded_mlflow, *who) for who in [(None,), ("trainer", "guessed-0123456"), ("trainer",)]]
    assert statuses == [401, 401, 200]
    assert requests.get(f"{guarded_mlflow.uri}/ajax-api/2.0/mlflow/users/list", timeout=30).status_code == 401


def test_only_an_admin_can_change_a_password(
    guarded_mlflow: guarded.GuardedMlflowServer, trainer: dict[str, str]
) -> None:
    assert guarded_mlflow.add_user("guest", PASSWORD).returncode == 0
    assert guarded_mlflow.add_user("guest", "another-password").returncode == 0
    assert [get(guarded_mlflow, "guest"), get(guarded_mlflow, "guest", "another-password")] == [401, 200]
    refused = guarded_mlflow.add_user("stranger", PASSWORD, **trainer)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert get(guarded_mlflow, "stranger") == 401


def test_a_missing_setting_is_an_error_with_its_name(tmp_path: Path) -> None:
    done = processes.run([processes.REPO / "infra/mlflow/serve"], cwd=tmp_path, env={"PGHOST": "db"})
    assert done.returncode == 2
    assert done.stderr.startswith("PGDATABASE is not set")


def test_no_secret_is_in_the_log_or_the_arguments(guarded_mlflow: guarded.GuardedMlflowServer) -> None:
    assert guarded_mlflow.process is not None
    parent = psutil.Process(guarded_mlflow.process.pid)
    said = guarded_mlflow.log.read_text() + "".join(
        " ".join(process.cmdline()) for process in [parent, *parent.children(recursive=True)]
    )
    for name in ("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"):
        assert guarded_mlflow.env[name] not in said


@dataclass
class Trained:
    """What a run with secrets in its environment left behind."""

    secrets: dict[str, str]
    arguments: set[str]
    """Arguments of every process that it started."""
    output: Path
    ray: Path
    """Ray's own logs."""


@pytest.fixture(scope="session")
def trained(
    trainer: dict[str, str], s3_server: servers.S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """A short digits run with its storage in S3, and a password in every setting that can have one."""
    with contextlib.closing(boto3.client("s3", **s3_server.client_options)) as client:
        client.create_bucket(Bucket="trained")
    folder, ray = tmp_path_factory.mktemp("trained"), Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    token = uuid.uuid4().hex
    given = {"RAY_TMPDIR": str(ray), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    secrets = {
        name: (trainer | s3_server.client_env | given)[name]
        for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")
    }
    words = [word for flag, value in SHORT.items() for word in (f"--{flag}", value)]
    found = Trained(secrets, set(), folder / "job.log", ray)
    with (
        processes.Job(
            "train", "digits", *words, log=found.output, env=trainer | s3_server.client_env | given
        ) as job,
        leaks.arguments([job.process.pid]) as found.arguments,
    ):
        assert job.wait() == 0, job.output
    yield found
    shutil.rmtree(ray, ignore_errors=True)


@pytest.fixture(scope="session")
def runs(guarded_mlflow: guarded.GuardedMlflowServer, trainer: dict[str, str], trained: Trained) -> list[Run]:
    """That run in MLflow, and a second one to compare it with, logged by a client without S3 credentials."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in trainer.items():
            patch.setenv(variable, value)
        client = mlflow.MlflowClient(guarded_mlflow.uri)
        experiment = client.get_experiment_by_name("ddpm").experiment_id
        other = client.create_run(experiment, run_name="other")
        client.log_param(other.info.run_id, "optim.lr", 0.000321)
        client.log_metric(other.info.run_id, "train/loss", 0.5, step=256)
        client.log_text(other.info.run_id, "hello", "note.txt")
        client.set_terminated(other.info.run_id)
        return sorted(client.search_runs([experiment]), key=lambda run: run.info.run_name)


def test_a_run_is_in_postgresql_and_its_images_are_in_s3(
    runs: list[Run],
    postgres: guarded.PostgresServer,
    s3_server: servers.S3Server,
) -> None:
    assert [run.info.run_name for run in runs] == ["other", "trained"]
    assert all(run.info.status == "FINISHED" for run in runs)
    keys = {
        item["Key"]
        for item in boto3.client("s3", **s3_server.client_options).list_objects_v2(
            Bucket="mlflow", Prefix="files/"
        )["Contents"]
    }
    trained = runs[1].info
    assert trained.artifact_uri.startswith("mlflow-artifacts:/")
    assert any(key.endswith(f"{trained.run_id}/artifacts/samples.png") for key in keys)
    assert any(key.endswith(f"{runs[0].info.run_id}/artifacts/note.txt") for key in keys)
    ours = f"experiment_id = {trained.experiment_id}"
    assert postgres.execute(f"SELECT name, status FROM runs WHERE {ours} ORDER BY name", "mlflow") == [
        ("other", "FINISHED"),
        ("trained", "FINISHED"),
    ]


def test_no_secret_is_written_anywhere(
    trained: Trained,
    runs: list[Run],
    guarded_mlflow: guarded.GuardedMlflowServer,
    postgres: guarded.PostgresServer,
    s3_server: servers.S3Server,
) -> None:
    """Checks output, arguments, Ray's logs, both buckets, all tables of MLflow, and its log."""
    texts: dict[str, bytes] = {
        "output": trained.output.read_bytes(),
        "MLflow's log": guarded_mlflow.log.read_bytes(),
        "arguments": "\n".join(trained.arguments).encode(),
        "MLflow's params": repr(runs[1].data.params | runs[1].data.tags).encode(),
    }
    texts |= leaks.in_files(trained.ray) | leaks.in_tables(postgres, "mlflow")
    with contextlib.closing(boto3.client("s3", **s3_server.client_options)) as client:
        texts |= leaks.in_bucket(client, "trained") | leaks.in_bucket(client, "mlflow")
    secrets = trained.secrets | {
        name: guarded_mlflow.env[name]
        for name in ("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")
    }
    assert any("ray" in words for words in trained.arguments)
    assert any("/logs/" in name for name in texts)
    assert any(name.endswith("net.safetensors") for name in texts)
    assert b"trained" in texts["table runs"]
    assert leaks.leaks(secrets, texts) == []


@pytest.fixture
def page(browser: Any, guarded_mlflow: guarded.GuardedMlflowServer, tmp_path: Path) -> Iterator[Any]:
    """A browser page of a user who is logged in; a screenshot is saved at the end."""
    context = browser.new_context(
        viewport={"width": 1600, "height": 1000},
        http_credentials={"username": "trainer", "password": PASSWORD},
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    yield page
    page.screenshot(path=tmp_path / "page.png")
    context.close()


def test_runs_can_be_compared_in_the_browser(page: Any, runs: list[Run], guarded_mlflow: Any) -> None:
    ids = json.dumps([run.info.run_id for run in runs])
    experiments = json.dumps([runs[0].info.experiment_id])
    page.goto(f"{guarded_mlflow.uri}/#/compare-runs?runs={ids}&experiments={experiments}")
    page.get_by_text("Comparing 2 Runs").first.wait_for()
    page.get_by_text("optim.lr", exact=True).first.wait_for()
    page.get_by_text("0.000321", exact=True).first.wait_for()


def test_sample_grids_are_shown_in_the_browser(page: Any, runs: list[Run], guarded_mlflow: Any) -> None:
    info = runs[1].info
    page.goto(f"{guarded_mlflow.uri}/#/experiments/{info.experiment_id}/runs/{info.run_id}/artifacts")
    page.get_by_text("pictures", exact=True).click()
    page.get_by_text("samples.png", exact=True).click()
    image = page.locator("img[src^='blob:']").first
    image.wait_for()
    size = image.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
    assert min(size) > 8


def test_the_browser_shows_nothing_without_a_password(
    browser: Any, runs: list[Run], guarded_mlflow: guarded.GuardedMlflowServer
) -> None:
    page = browser.new_page()
    with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):
        page.goto(f"{guarded_mlflow.uri}/#/experiments/{runs[0].info.experiment_id}")
    page.close()


def test_a_wrong_password_is_reported_and_records_are_kept(
    guarded_mlflow: guarded.GuardedMlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = "not-the-password-0"
    for variable, value in guarded_mlflow.client_env("admin", wrong).items():
        monkeypatch.setenv(variable, value)
    buffer = tracked.spool_in(tmp_path)
    tracked.put(buffer, 256, 0, 128)
    delivery = tracked.deliver(tracked.address_at(guarded_mlflow.uri), buffer, committed=256)
    assert (delivery.run_id, delivery.ended) == (None, False)
    assert "training continues, records are kept in" in caplog.text
    assert "401" in caplog.text
    assert wrong not in caplog.text
    assert tracked.names_in(buffer)
