"""python jobs/sync.py from the command line, after MLflow was down."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from support import servers
from support.tracked import assert_delivered_once, deliver, names_in, put, run_of

from ddpm.checkpoints import checkpoint, runs
from ddpm.checkpoints.runs import Run
from ddpm.config import Config
from ddpm.config_io import override, to_json
from ddpm.tracking import spool
from ddpm.tracking.mlflow_runs import Address

CONFIG = override(Config(), {"run.experiment": "tracked", "train.total_images": 128, "optim.lr": 0.5})


def write_checkpoint(run: Run, images_seen: int, config: Config = CONFIG) -> None:
    folder = run.location.child(checkpoint.name_at(images_seen))
    folder.child("config.json").write(to_json(config).encode())
    folder.child("checksums.json").write(b"{}")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that finished at 128 images while MLflow was down."""
    run = runs.open_run("a-run", str(tmp_path / "runs"))
    buffer = run.location.child(spool.FOLDER)
    put(buffer, 64, 32, 64)
    put(buffer, 128, 96, 128, files=True)
    for images_seen in (64, 128):
        write_checkpoint(run, images_seen)
    return run


def address_of(run: Run, uri: str, experiment: str = "tracked") -> Address:
    return Address(uri, experiment, run.name, run.key)


def sync(run_job: Callable[..., Any], *args: object, uri: str) -> Any:
    return run_job("sync", *args, env={"MLFLOW_TRACKING_URI": uri})


def test_it_delivers_the_spool_of_a_finished_run(
    run_job: Callable[..., Any], run: Run, mlflow_server: str, tmp_path: Path
) -> None:
    (port,) = servers.free_ports(1)
    buffer, absent = run.location.child("tracking"), f"http://{servers.LOOPBACK}:{port}"
    away = sync(run_job, run.location.uri, "--timeout-s", 1, uri=absent)
    assert away.returncode == 1
    assert (
        f"error: MLflow at {absent} cannot be reached, all records are kept: no call succeeded for 1 s"
        in away.stderr
    )
    assert "Traceback" not in away.stderr
    assert len(names_in(buffer)) == 2

    done = sync(run_job, run.location.uri, uri=mlflow_server)
    assert done.returncode == 0, done.stderr
    address = address_of(run, mlflow_server)
    found = run_of(address)
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["delivered   10 records", f"MLflow      run {found.info.run_id} in {mlflow_server}"]
    assert lines[-3] == "records 10/10"
    assert (found.info.run_name, found.info.status) == ("a-run", "FINISHED")
    assert (found.data.params["optim.lr"], found.data.params["train.total_images"]) == ("0.5", "128")
    assert_delivered_once(address, 32, 64, 96, 128)
    assert names_in(buffer) == []

    again = sync(run_job, run.location.uri, uri=mlflow_server)
    assert again.returncode == 0, again.stderr
    assert "delivered   0 records" in again.stdout
    assert_delivered_once(address, 32, 64, 96, 128)


def test_an_unfinished_run_in_a_bucket_keeps_its_status(
    run_job: Callable[..., Any], mlflow_server: str, s3_bucket: str
) -> None:
    run = runs.open_run("b-run", f"{s3_bucket}/runs")
    buffer, address = run.location.child("tracking"), address_of(run, mlflow_server)
    deliver(address, buffer, -1, "FAILED")
    write_checkpoint(run, 64)
    put(buffer, 64, 64)
    put(buffer, 96, 96, failed=True)
    put(buffer, 128, 128)  # of a checkpoint that was never written
    done = sync(run_job, run.location.uri, uri=mlflow_server)
    assert done.returncode == 0, done.stderr
    assert_delivered_once(address, 64, 96)
    assert run_of(address).info.status == "FAILED"


def test_a_segment_before_the_first_checkpoint_goes_to_the_default_experiment(
    run_job: Callable[..., Any], mlflow_server: str, tmp_path: Path
) -> None:
    run = runs.open_run("c-run", str(tmp_path / "runs"))
    put(run.location.child("tracking"), 64, 64, failed=True)
    done = sync(run_job, run.location.uri, uri=mlflow_server)
    assert done.returncode == 0, done.stderr
    assert_delivered_once(address_of(run, mlflow_server, Config().run.experiment), 64)


def test_undelivered_records_are_an_error(run_job: Callable[..., Any], run: Run, mlflow_server: str) -> None:
    damaged = run.location.child("tracking").child("000000000064.zip")
    damaged.write(b"")
    done = sync(run_job, run.location.uri, uri=mlflow_server)
    assert done.returncode == 1
    assert f"{damaged.uri} is damaged" in done.stderr
    assert f"did not accept everything: 1 records are kept in {damaged.uri.rpartition('/')[0]}" in done.stderr
    address = address_of(run, mlflow_server)
    assert_delivered_once(address, 96, 128)
    assert run_of(address).info.status == "FINISHED"


def test_a_damaged_run_is_one_line_with_exit_code_2(
    user_error: Callable[..., str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/never.db")
    for file, message in (
        (run.location.child(checkpoint.name_at(128)).child("config.json"), "config.json: unknown key 'x'"),
        (run.location.child("run.json"), "run.json is damaged"),
    ):
        file.write(b'{"x": 1}')
        assert message in user_error("sync", run.location.uri)
    assert not (tmp_path / "never.db").exists()


def test_a_half_made_database_is_reported_and_a_new_one_gets_all_records(
    run_job: Callable[..., Any], run: Run, tmp_path: Path
) -> None:
    """As after a first run that was killed while MLflow created its tables."""
    database = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(database)) as opened:
        opened.execute("CREATE TABLE _alembic_tmp_experiments (experiment_id INTEGER)")
    refused = run_job("sync", "runs/a-run", cwd=tmp_path, env={"MLFLOW_TRACKING_URI": ""})
    assert refused.returncode == 1
    assert f"refuses the run: {database} is incomplete: " in refused.stderr
    assert "Move this file away" in refused.stderr and "Traceback" not in refused.stderr
    database.rename(tmp_path / "aside.db")
    done = run_job("sync", "runs/a-run", cwd=tmp_path, env={"MLFLOW_TRACKING_URI": ""})
    assert done.returncode == 0, done.stderr
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert f"in {uri}" in done.stdout
    assert_delivered_once(address_of(run, uri), 32, 64, 96, 128)
    assert len(MlflowClient(uri).search_experiments()) == 2  # MLflow's folder, and ours
