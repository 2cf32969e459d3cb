"""Records are delivered to MLflow exactly once, to the MLflow run of their run key.

Tested with a real server and with a SQLite file, the default on a laptop.
"""

import logging
import sqlite3
import uuid
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from support import servers
from support.processes import wait_for
from support.tracked import (
    FILES,
    PARAMS,
    address_at,
    assert_delivered_once,
    deliver,
    image_counts,
    names_in,
    points,
    put,
    put_records,
    run_of,
    warnings_of,
)

from ddpm.storage.locations import Location
from ddpm.tracking.metrics_buffer import Metrics, Picture
from ddpm.tracking.mlflow_client import tracking_uri, without_password
from ddpm.tracking.mlflow_runs import Address, MlflowRun
from ddpm.tracking.pages import STOPPED
from ddpm.tracking.uploader import Uploader
from ddpm.utils.images import png_bytes


@pytest.fixture(params=["server", "sqlite"])
def uri(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("mlflow_server") if request.param == "server" else tracking_uri()


@pytest.fixture
def address(uri: str) -> Address:
    return address_at(uri)


def test_all_records_reach_mlflow(
    address: Address, buffer: Location, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(buffer, 64, 32, 64)
    put(buffer, 128, 96, 128, files=True)
    delivery = deliver(address, buffer, 128)
    run, client = run_of(address), MlflowClient(address.uri)
    assert (delivery.run_id, delivery.experiment_id) == (run.info.run_id, run.info.experiment_id)
    assert (delivery.undelivered, delivery.ended) == (0, True)
    assert names_in(buffer) == []
    assert (run.info.run_name, run.info.status) == ("a-run", "FINISHED")
    assert run.info.end_time >= run.info.start_time
    assert run.data.params == {name: str(value) for name, value in PARAMS.items()}
    assert_delivered_once(address, 32, 64, 96, 128)
    for name, data in FILES.items():
        path = client.download_artifacts(delivery.run_id, name, str(tmp_path))
        assert Path(path).read_bytes() == data
    for file in client.list_artifacts(delivery.run_id, "images"):
        level = int(file.path.split("+")[2])
        with Image.open(client.download_artifacts(delivery.run_id, file.path, str(tmp_path))) as image:
            assert image.size == (12, 8)
            assert np.abs(np.asarray(image).astype(int) - level).max() <= (0 if image.format == "PNG" else 2)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED", STOPPED])
def test_a_closed_run_gets_the_given_status(mlflow_server: str, buffer: Location, status: str) -> None:
    address = address_at(mlflow_server)
    deliver(address, buffer, -1, status)
    assert run_of(address).info.status == status


def test_a_resumed_run_continues_its_mlflow_run(address: Address, buffer: Location) -> None:
    put(buffer, 64, 64)
    before = deliver(address, buffer, 64, "FAILED")
    put(buffer, 128, 128)
    after = deliver(address, buffer, 128, **{"optim.lr": 2e-3, "train.total_images": 128})
    assert (after.run_id, after.experiment_id) == (before.run_id, before.experiment_id)
    run = run_of(address)
    assert run.info.status == "FINISHED"
    assert_delivered_once(address, 64, 128)
    assert run.data.params["optim.lr"] == "0.001"  # params never change in MLflow
    assert run.data.params["train.total_images"] == "128"
    assert {k: v for k, v in run.data.tags.items() if k.startswith("resumed.")} == {
        "resumed.optim.lr": "0.002"
    }


def test_a_resumed_failed_run_has_status_running(address: Address, buffer: Location) -> None:
    failed, other = deliver(address, buffer, -1, "FAILED"), deliver(address_at(address.uri), buffer, -1)
    assert failed.run_id != other.run_id  # each run key has its own MLflow run
    again = Uploader(address, PARAMS, buffer)
    again.begin()
    wait_for(lambda: run_of(address).info.status == "RUNNING")
    again.close("FINISHED")


def test_a_segment_sent_twice_is_stored_once(address: Address, buffer: Location) -> None:
    """As when an uploader dies after it delivered a segment and before it deleted it."""
    segment = put(buffer, 64, 32, 64, files=True)
    data = segment.read()
    deliver(address, buffer, 64)
    segment.write(data)
    deliver(address, buffer, 64)
    assert_delivered_once(address, 32, 64)
    assert names_in(buffer) == []


def test_mlflow_stores_a_repeated_point_once(address: Address, buffer: Location) -> None:
    """A request that timed out may have succeeded: sending a point again must not duplicate it."""
    odd = Metrics({"loss": 0.1, "nan": float("nan"), "inf": float("inf")}, 64, 1_700_000_000_000)
    run = MlflowRun(address, {})
    run.open(running=True)
    for _ in range(2):
        run._sent_until = -1  # otherwise it would ask the server first
        assert run.send([odd])
    for key in odd.values:
        assert len(points(address, key)) == 1


def test_a_run_resumed_from_an_older_checkpoint_has_no_duplicates(address: Address, buffer: Location) -> None:
    put(buffer, 64, 32, 64)
    put(buffer, 128, 96, 128)
    deliver(address, buffer, 128, "FAILED")
    put(buffer, 192, 96, 128, 160, 192)  # as if the checkpoint at 128 was damaged
    put_records(buffer, 193, Metrics({"held_out/loss": 0.5, "train/loss": 7.0}, 64, 1))  # new at an old step
    deliver(address, buffer, 193)
    assert_delivered_once(address, 32, 64, 96, 128, 160, 192)
    assert points(address, "held_out/loss") == [(64, 0.5)]


def test_records_that_mlflow_rejects_are_skipped_and_the_rest_is_delivered(
    address: Address, buffer: Location, caplog: pytest.LogCaptureFixture
) -> None:
    png = png_bytes(np.zeros((2, 2, 3), np.uint8))
    refused = [Metrics({"no such: name?!": 1.0, "good": 2.0}, 2, 2), Picture("no:key", png, 3, 3)]
    put_records(buffer, 4, Metrics({"good": 1.0}, 1, 1), *refused, Metrics({"good": 3.0}, 4, 4))
    put(buffer, 64, 64)
    delivery = deliver(address, buffer, 64, **{"a bad (param)": 1})
    assert (delivery.undelivered, delivery.ended) == (0, True)
    assert run_of(address).data.params == {name: str(value) for name, value in PARAMS.items()}
    assert points(address, "good") == [(1, 1.0), (2, 2.0), (4, 3.0)]
    assert_delivered_once(address, 64)
    refusals = warnings_of(caplog)
    assert len(refusals) == 3, refusals
    assert "MLflow refuses param a bad (param), which is skipped" in refusals[0]
    assert "MLflow refuses metric no such: name?! at 2, which is skipped" in refusals[1]
    assert "MLflow refuses image no:key at 3, which is skipped" in refusals[2]
    put_records(buffer, 65, *refused)  # again: now these steps have been sent before
    assert deliver(address, buffer, 65).undelivered == 0
    assert points(address, "good") == [(1, 1.0), (2, 2.0), (4, 3.0)]


def test_points_of_any_value_and_time_and_more_than_one_request_allows_are_delivered(
    address: Address, buffer: Location
) -> None:
    odd = [Metrics({"loss": value}, step, 1_234_567_890_123) for step, value in enumerate((np.nan, np.inf))]
    many = [Metrics({f"m{i}": float(step) for i in range(50)}, step, step) for step in range(30)]
    put_records(buffer, 30, *odd, *many)
    assert deliver(address, buffer, 30, **{f"param.{i}": i for i in range(230)}).undelivered == 0
    run = run_of(address)
    assert sum(name.startswith("param.") for name in run.data.params) == 230
    loss = {
        point.step: point for point in MlflowClient(address.uri).get_metric_history(run.info.run_id, "loss")
    }
    assert np.isnan(loss[0].value) and loss[1].value > 1e300
    assert {point.timestamp for point in loss.values()} == {1_234_567_890_123}  # when it was measured
    for key in ("m0", "m49"):
        assert points(address, key) == [(step, float(step)) for step in range(30)]


def test_records_are_kept_when_their_run_was_deleted_in_mlflow(
    address: Address, buffer: Location, caplog: pytest.LogCaptureFixture
) -> None:
    uploader = Uploader(address, PARAMS, buffer)
    uploader.begin()
    put(buffer, 64, 64)
    uploader.committed(64)
    wait_for(lambda: names_in(buffer) == [])
    MlflowClient(address.uri).delete_run(run_of(address).info.run_id)
    put(buffer, 128, 128)
    uploader.committed(128)
    assert uploader.close("FINISHED").undelivered == 2
    assert "was deleted in MLflow" in caplog.text
    assert deliver(address, buffer, 128).undelivered == 0
    assert_delivered_once(address, 128)  # in a new MLflow run


def test_the_password_is_not_logged_when_the_server_works(
    mlflow_server: str, buffer: Location, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    put_records(buffer, 2, Metrics({"no such: name?!": 1.0}, 2, 2))
    put(buffer, 64, 64)
    delivery = deliver(address_at(mlflow_server.replace("://", "://me:s3cret@")), buffer, 64)
    assert (delivery.undelivered, delivery.ended) == (0, True)
    assert "refuses" in caplog.text
    assert "s3cret" not in caplog.text + "".join(capfd.readouterr())


def test_the_password_is_not_logged_when_the_server_is_down(
    buffer: Location, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (port,) = servers.free_ports(1)
    caplog.set_level(logging.DEBUG)
    uploader = Uploader(address_at(f"http://me:s3cret@{servers.LOOPBACK}:{port}"), {}, buffer)
    uploader.begin()
    wait_for(lambda: "is not accepting data" in caplog.text)
    uploader.close("FINISHED", timeout_s=1)
    assert f"http://{servers.LOOPBACK}:{port}" in caplog.text
    assert "s3cret" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:pass@host:5000/path", "http://host:5000/path"),
        ("http://me:p@ss://word@host", "http://host"),
        ("https://host", "https://host"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_without_password(uri: str, shown: str) -> None:
    assert without_password(uri) == shown


def test_a_relative_database_path_is_relative_to_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub.db")
    assert tracking_uri() == f"sqlite:///{tmp_path}/sub.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri() == "http://host:5000"


def test_artifacts_are_stored_beside_the_database(
    tmp_path: Path, buffer: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("driver", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "driver")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    address = address_at(tracking_uri(), uuid.uuid4().hex)
    monkeypatch.chdir(tmp_path / "elsewhere")
    put(buffer, 64, 64, files=True)
    assert deliver(address, buffer, 64).undelivered == 0
    (card,) = tmp_path.rglob("card.txt")
    assert card.is_relative_to(tmp_path / "driver" / "mlruns")
    with sqlite3.connect(tmp_path / "driver" / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    database.close()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert image_counts(address) == {(64, "png"): 1, (64, "webp"): 1}
