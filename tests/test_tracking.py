"""What is tracked arrives, sooner or later and once; and training never waits for it.

The servers are real, or sockets that behave as broken servers do.
"""

import logging
import re
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import servers
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from ddpm import tracking
from ddpm.tracking import Address, Delivery, MlflowTracker, tracking_uri, without_password

PARAMS = {"optim.lr": 1e-3, "model.width_multipliers": (1, 2), "data.source": None}
# Far above what anything here takes, even on a busy machine: only a call that waits for a server exceeds it.
PATIENCE_S = 8.0


@pytest.fixture(params=["server", "sqlite"])
def uri(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("mlflow_server") if request.param == "server" else tracking_uri()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server((servers.LOOPBACK, 0), backlog=50) as server:
        yield f"http://{servers.LOOPBACK}:{server.getsockname()[1]}"


def address_at(uri: str, key: str | None = None) -> Address:
    return Address(uri, "tracking", "a-run", key or uuid.uuid4().hex)


def track(uri: str, key: str | None = None, **params: Any) -> MlflowTracker:
    return MlflowTracker(address_at(uri, key), PARAMS | params)


def within(patience_s: float, call: Callable[[], Any]) -> Any:
    """What `call` returns; it fails when it takes longer, instead of hanging."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(patience_s)
    assert not thread.is_alive(), f"it blocks: no return in {patience_s} s"
    assert results, "it raised"
    return results[0]


def log_everything(tracker: MlflowTracker, images_seen: int = 64) -> None:
    picture = np.full((8, 12, 3), images_seen % 256, np.uint8)
    tracker.metrics({"train/loss": 1 / images_seen, "train/lr": 1e-3}, images_seen)
    tracker.image("samples", picture, images_seen)
    tracker.artifact("pictures/strip.txt", b"strip")
    tracker.artifact("card.txt", b"card")


def tracked_run(uri: str, delivery: Delivery) -> Run:
    assert delivery.run_id is not None
    run = MlflowClient(uri).get_run(delivery.run_id)
    assert run.info.experiment_id == delivery.experiment_id
    return run


def history(uri: str, delivery: Delivery, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(uri).get_metric_history(delivery.run_id, key)
    return sorted((point.step, point.value) for point in points)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_everything_arrives(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = track(uri)
    for images_seen in (64, 128):
        log_everything(tracker, images_seen)
    delivery = tracker.close(timeout_s=30)
    assert delivery.undelivered == 0, warnings_of(caplog)
    run, client = tracked_run(uri, delivery), MlflowClient(uri)
    assert (run.info.run_name, run.info.status) == ("a-run", "FINISHED")
    assert run.info.end_time >= run.info.start_time
    assert run.data.params == {name: str(value) for name, value in PARAMS.items()}
    assert history(uri, delivery, "train/loss") == [(64, 1 / 64), (128, 1 / 128)]
    assert history(uri, delivery, "train/lr") == [(64, 1e-3), (128, 1e-3)]
    for name, text in {"pictures/strip.txt": "strip", "card.txt": "card"}.items():
        assert Path(client.download_artifacts(delivery.run_id, name, str(tmp_path))).read_text() == text
    steps = {}
    for path in [a.path for a in client.list_artifacts(delivery.run_id, "images") if a.path.endswith(".png")]:
        step = re.search(r"samples\Wstep\W(\d+)", path)
        assert step is not None, path
        with Image.open(client.download_artifacts(delivery.run_id, path, str(tmp_path))) as picture:
            steps[int(step[1])] = (picture.size, picture.getpixel((0, 0)))
    assert steps == {64: ((12, 8), (64, 64, 64)), 128: ((12, 8), (128, 128, 128))}
    assert warnings_of(caplog) == []


def test_system_metrics_come_along(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SYSTEM_INTERVAL_S", 0.1)
    tracker = track(uri)
    deadline = time.monotonic() + 60
    while tracker._run_id is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)  # the first sample is taken after a second
    names = set(tracked_run(uri, tracker.close()).data.metrics)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= names


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_a_run_ends_as_it_is_closed(uri: str, status: str) -> None:
    assert tracked_run(uri, track(uri).close(status)).info.status == status


def test_a_restarted_run_goes_on_in_its_mlflow_run(uri: str) -> None:
    key = uuid.uuid4().hex
    first = track(uri, key)
    first.metrics({"train/loss": 1.0}, 64)
    before = first.close("FAILED")
    second = track(uri, key, **{"optim.lr": 2e-3, "train.total_images": 128})
    second.metrics({"train/loss": 0.5}, 128)
    after = second.close()
    assert (after.run_id, after.experiment_id) == (before.run_id, before.experiment_id)
    run = tracked_run(uri, after)
    assert run.info.status == "FINISHED"
    assert history(uri, after, "train/loss") == [(64, 1.0), (128, 0.5)]
    assert run.data.params["optim.lr"] == "0.001"  # params never change in MLflow
    assert run.data.params["train.total_images"] == "128"
    assert {k: v for k, v in run.data.tags.items() if k.startswith("resumed.")} == {
        "resumed.optim.lr": "0.002"
    }


def test_while_it_goes_on_a_failed_run_is_running(uri: str) -> None:
    key = uuid.uuid4().hex
    track(uri, key).close("FAILED")
    again = track(uri, key)
    deadline = time.monotonic() + 60
    while again._run_id is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert MlflowClient(uri).get_run(again._run_id).info.status == "RUNNING"
    again.close()


def test_runs_with_other_keys_are_other_runs(uri: str) -> None:
    assert track(uri).close().run_id != track(uri).close().run_id


def test_what_mlflow_refuses_is_left_out_and_the_rest_arrives(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = track(uri)
    tracker.metrics({"good": 1.0}, 1)
    tracker.metrics({"no such: name?!": 1.0}, 2)
    tracker.image("bad", np.zeros((2, 2, 7), np.uint8), 3)
    tracker.metrics({"good": 2.0}, 4)
    log_everything(tracker)
    delivery = tracker.close()
    assert delivery.undelivered == 2
    assert tracked_run(uri, delivery).info.status == "FINISHED"
    assert history(uri, delivery, "good") == [(1, 1.0), (4, 2.0)]
    assert history(uri, delivery, "train/loss") == [(64, 1 / 64)]
    assert sum("refuses" in line for line in warnings_of(caplog)) == 2


def test_a_loss_that_is_no_number_arrives(uri: str) -> None:
    tracker = track(uri)
    tracker.metrics({"loss": float("nan")}, 1)
    tracker.metrics({"loss": float("inf")}, 2)
    delivery = tracker.close()
    assert delivery.undelivered == 0
    values = dict(history(uri, delivery, "loss"))
    assert np.isnan(values[1])
    assert values[2] > 1e300


def test_more_points_than_one_call_may_carry(uri: str) -> None:
    tracker = track(uri, **{f"param.{i}": i for i in range(230)})
    for step in range(30):
        tracker.metrics({f"m{i}": float(step) for i in range(50)}, step)
    delivery = tracker.close(timeout_s=120)
    assert delivery.undelivered == 0
    run = tracked_run(uri, delivery)
    assert sum(name.startswith("param.") for name in run.data.params) == 230
    assert history(uri, delivery, "m49") == [(step, float(step)) for step in range(30)]


def test_a_server_that_is_never_there_costs_training_nothing(caplog: pytest.LogCaptureFixture) -> None:
    (port,) = servers.free_ports(1)
    tracker = within(PATIENCE_S, lambda: track(f"http://{servers.LOOPBACK}:{port}"))
    within(PATIENCE_S, lambda: [log_everything(tracker, i) for i in range(1, 51)])
    time.sleep(3)  # a few attempts
    delivery = within(2 + PATIENCE_S, lambda: tracker.close(timeout_s=2))
    assert delivery == Delivery(None, None, 200)
    lines = warnings_of(caplog)
    assert len(lines) == 2, lines
    assert "is not taking data" in lines[0]
    assert f"http://127.0.0.1:{port} did not take everything (200 items left)" in lines[1]


def test_a_server_that_never_answers_costs_training_nothing(silent_server: str) -> None:
    tracker = within(PATIENCE_S, lambda: track(silent_server))
    time.sleep(2)  # by now the thread hangs in its first request
    within(PATIENCE_S, lambda: [log_everything(tracker, i) for i in range(1, 51)])
    delivery = within(2 + PATIENCE_S, lambda: tracker.close(timeout_s=2))
    assert delivery == Delivery(None, None, 200)


def test_a_password_is_never_shown(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (port,) = servers.free_ports(1)
    caplog.set_level(logging.DEBUG)
    tracker = track(f"http://me:s3cret@{servers.LOOPBACK}:{port}")
    time.sleep(3)
    tracker.close(timeout_s=1)
    assert f"http://{servers.LOOPBACK}:{port}" in caplog.text
    assert "s3cret" not in caplog.text + "".join(capfd.readouterr())


def test_a_password_is_not_shown_by_a_server_that_works(
    mlflow_server: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    tracker = track(mlflow_server.replace("://", "://me:s3cret@"))
    tracker.metrics({"no such: name?!": 1.0}, 2)
    log_everything(tracker)
    assert tracker.close().undelivered == 1
    assert "refuses" in caplog.text
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


@pytest.mark.slow
def test_a_server_that_comes_late_gets_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = servers.MlflowServer(tmp_path / "late")
    tracker = track(server.uri)
    log_everything(tracker)
    time.sleep(3)
    with server:
        delivery = tracker.close(timeout_s=60)
        assert delivery.undelivered == 0
        assert tracked_run(server.uri, delivery).info.status == "FINISHED"
        assert history(server.uri, delivery, "train/loss") == [(64, 1 / 64)]
        names = {a.path for a in MlflowClient(server.uri).list_artifacts(delivery.run_id)}
        assert names == {"card.txt", "images", "pictures"}
    assert len(warnings_of(caplog)) == 1


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_has_each_point_once(tmp_path: Path) -> None:
    with servers.MlflowServer(tmp_path / "killed") as server:
        tracker = track(server.uri)
        stop, count = threading.Event(), 0

        def train() -> None:
            nonlocal count
            while not stop.wait(0.02):
                count += 1
                tracker.metrics({"train/loss": 1 / count}, count)

        training = threading.Thread(target=train)
        training.start()
        time.sleep(2.5)
        server.kill()
        time.sleep(1.5)
        server.start()
        stop.set()
        training.join()
        delivery = tracker.close(timeout_s=90)
        assert delivery.undelivered == 0
        assert history(server.uri, delivery, "train/loss") == [(i, 1 / i) for i in range(1, count + 1)]
        (run,) = MlflowClient(server.uri).search_runs([delivery.experiment_id])
        assert run.info.status == "FINISHED"


def test_a_relative_database_is_the_driver_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub.db")
    assert tracking_uri() == f"sqlite:///{tmp_path}/sub.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri() == "http://host:5000"


def test_artifacts_lie_beside_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "driver").mkdir()
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "driver")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    address = address_at(tracking_uri())
    monkeypatch.chdir(tmp_path / "worker")
    tracker = MlflowTracker(address, {})
    tracker.artifact("card.txt", b"card")
    assert tracker.close(timeout_s=90).undelivered == 0
    (card,) = tmp_path.rglob("card.txt")
    assert card.is_relative_to(tmp_path / "driver" / "mlruns")
    with sqlite3.connect(tmp_path / "driver" / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    database.close()
    assert list((tmp_path / "worker").iterdir()) == []
