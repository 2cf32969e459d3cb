"""python jobs/sync.py from the command line."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support import servers, tracked

from ddpm.runs import curves, run_folder
from ddpm.runs.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run that MLflow does not have."""
    return tracked.write_run(tmp_path / "runs")


def sync(run_job: Callable[..., Any], *args: object, uri: str) -> Any:
    return run_job("sync", *args, env={"MLFLOW_TRACKING_URI": uri})


def test_a_run_is_sent_once_mlflow_answers(
    run_job: Callable[..., Any], run: RunFolder, mlflow_server: str
) -> None:
    (port,) = servers.free_ports(1)
    absent = f"http://{servers.LOOPBACK}:{port}"
    away = sync(run_job, run.location.uri, "--timeout-s", 1, uri=absent)
    assert away.returncode == 1
    (line,) = away.stderr.splitlines()
    assert absent in line and "a-run" in line

    done = sync(run_job, run.location.uri, uri=mlflow_server)
    assert done.returncode == 0, done.stderr
    found = tracked.content(mlflow_server, run)
    run_id = tracked.run_with_key(mlflow_server, run.key).info.run_id
    points = curves.num_rows(run.location)
    assert done.stdout.splitlines() == [
        f"sent        {points} points",
        f"MLflow      run {run_id} in {mlflow_server}",
    ]
    assert found["status"] == "FINISHED"
    assert len(found["metrics"]["train/lr"]) == 4

    again = sync(run_job, run.location.uri, uri=mlflow_server)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("sent        0 points")
    assert tracked.content(mlflow_server, run) == found


def test_a_run_that_trains_in_a_bucket(
    run_job: Callable[..., Any], mlflow_server: str, s3_bucket: str
) -> None:
    run = tracked.begin(f"{s3_bucket}/runs")
    tracked.train(run, 32, 64)
    done = sync(run_job, run.location.uri, uri=mlflow_server)
    assert done.returncode == 0, done.stderr
    found = tracked.content(mlflow_server, run)
    assert (found["status"], found["time"][1]) == ("RUNNING", None)
    assert len(found["metrics"]["train/lr"]) == 2


def test_what_is_no_run_is_one_line_with_exit_code_2(
    user_error: Callable[..., str], run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/never.db")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in user_error("sync", str(empty))
    card = run.location.child(run_folder.CARD)
    config = run.location.child("checkpoint-000000000128-g1/config.json")
    for file in (config, card):
        file.write(b'{"x": 1}')
        assert file.uri in user_error("sync", run.location.uri)
    assert not (tmp_path / "never.db").exists()


def test_a_half_made_database_is_reported_and_a_new_one_gets_everything(
    run_job: Callable[..., Any], run: RunFolder, tmp_path: Path
) -> None:
    """As after a first run that was killed while MLflow created its tables."""
    database = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(database)) as opened:
        opened.execute("CREATE TABLE _alembic_tmp_experiments (experiment_id INTEGER)")
    refused = run_job("sync", "runs/a-run", cwd=tmp_path, env={"MLFLOW_TRACKING_URI": ""})
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert f"{database} is incomplete" in line
    database.rename(tmp_path / "aside.db")
    done = run_job("sync", "runs/a-run", cwd=tmp_path, env={"MLFLOW_TRACKING_URI": ""})
    assert done.returncode == 0, done.stderr
    uri = f"sqlite:///{database}"
    assert f"in {uri}" in done.stdout
    assert tracked.content(uri, run)["status"] == "FINISHED"
