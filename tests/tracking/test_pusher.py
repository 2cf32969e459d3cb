"""While a run trains, nothing waits for MLflow, and everything arrives there, whatever fails in between.

Servers are really killed; hanging and failing servers are simulated by sockets and proxies.
"""

import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support import servers, tracked
from support.processes import wait_for
from support.proxy import FaultyProxy
from support.tracked import MlflowFaultProxy, content, warnings_of

from ddpm.runs import run_folder, storage
from ddpm.runs.run_folder import RunFolder
from ddpm.tracking import pusher as pusher_module
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.push import push
from ddpm.tracking.pusher import MIN_BEGIN_S, Delivery, Pusher
from ddpm.utils.errors import UserError

# Far longer than anything here takes, even on a busy machine: only a call that blocks on a server exceeds it.
LONG_S = 60.0


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push that failed is repeated soon, and not by MLflow's client, as in a process that only pushes."""
    monkeypatch.setattr(pusher_module, "FIRST_WAIT_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that trains."""
    run = tracked.begin(tmp_path)
    tracked.train(run, 32, 64)
    return run


def use(monkeypatch: pytest.MonkeyPatch, uri: str) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def hanging_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server((servers.LOOPBACK, 0), backlog=50) as server:
        yield use(monkeypatch, f"http://{servers.LOOPBACK}:{server.getsockname()[1]}")


@pytest.fixture
def absent_server(monkeypatch: pytest.MonkeyPatch) -> str:
    return use(monkeypatch, f"http://{servers.LOOPBACK}:{servers.free_ports(1)[0]}")


def within(patience_s: float, call: Callable[[], Any]) -> Any:
    """Return what `call` returns; fail instead of hanging if it takes longer."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(patience_s)
    assert not thread.is_alive(), f"it blocks: no return in {patience_s} s"
    assert results, "it raised"
    return results[0]


def train_on(run: RunFolder, pusher: Pusher, *steps: int) -> None:
    """A checkpoint, which the pusher is told of; nothing here may wait."""
    tracked.train(run, *steps)
    within(LONG_S, pusher.notify)


def has_pushed(uri: str, run: RunFolder, images_seen: int) -> bool:
    points = tracked.history(uri, tracked.run_with_key(uri, run.key), "train/loss")
    return bool(points) and points[-1][0] == images_seen


def assert_complete(run: RunFolder, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow has the same as after one push of the finished run, to the database that all tests share."""
    found = content(uri, run)
    assert found["status"] == "FINISHED"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    push(run)
    assert found == content(tracking_uri(), run)


def test_each_checkpoint_is_pushed_while_the_run_trains(
    run: RunFolder,
    mlflow_server: str,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(monkeypatch, mlflow_server)
    run = tracked.begin(f"{s3_bucket}/runs")
    pusher = Pusher(run)
    within(LONG_S, pusher.begin)
    train_on(run, pusher, 32, 64)
    wait_for(lambda: pusher.waiting == 0)
    assert has_pushed(mlflow_server, run, 64)
    assert tracked.run_with_key(mlflow_server, run.key).info.status == "RUNNING"
    train_on(run, pusher, 96, 128)
    tracked.finish(run)
    delivery = pusher.close()
    assert delivery.is_complete and delivery.pushed is not None
    assert delivery.pushed.run_id == tracked.run_with_key(mlflow_server, run.key).info.run_id
    assert_complete(run, mlflow_server, monkeypatch)
    assert warnings_of(caplog) == []


# MLflow is down.


def test_a_server_that_is_down_blocks_nothing(
    run: RunFolder, absent_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    pusher = Pusher(run)
    within(LONG_S, pusher.begin)
    wait_for(lambda: warnings_of(caplog))
    train_on(run, pusher, 96)
    train_on(run, pusher, 128)
    assert pusher.waiting == 2
    assert within(LONG_S, lambda: pusher.close(patience_s=0.9)) == Delivery(None, False)
    (line,) = warnings_of(caplog)
    assert absent_server in line and "\n" not in line


def test_a_server_that_hangs_blocks_nothing(run: RunFolder, hanging_server: str) -> None:
    pusher = Pusher(run)
    within(LONG_S, pusher.begin)
    train_on(run, pusher, 96)
    assert within(LONG_S, lambda: pusher.close(patience_s=0.9)) == Delivery(None, False)


def test_close_with_little_patience_does_not_import_mlflow(run: RunFolder, absent_server: str) -> None:
    hasty = Pusher(run)
    patient = Pusher(run)
    assert hasty.close(patience_s=MIN_BEGIN_S - 1) == Delivery(None, False)
    assert patient.close(patience_s=MIN_BEGIN_S) == Delivery(None, False)
    assert (hasty._thread.ident, patient._thread.ident is None) == (None, False)


@pytest.mark.slow
def test_close_waits_for_a_slow_server_that_accepts(
    run: RunFolder, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All calls together take longer than its patience."""
    use(monkeypatch, mlflow_server)
    tracked.finish(run, 64)
    with FaultyProxy(mlflow_server) as slow:
        slow.switch("delay", delay_s=0.5)
        use(monkeypatch, slow.endpoint)
        delivery = Pusher(run).close(patience_s=15)
        assert delivery.is_complete
        assert slow.requests["delay"] > 30
    assert_complete(run, mlflow_server, monkeypatch)


def test_each_outage_is_one_line_and_everything_arrives(
    run: RunFolder, mlflow_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[tuple[object, ...]] = []

    def fails(*request: object) -> tuple[int, dict[str, str]]:
        refused.append(request)
        return 503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}

    with MlflowFaultProxy(mlflow_server) as proxy:
        use(monkeypatch, proxy.uri)
        pusher = Pusher(run)
        pusher.begin()
        wait_for(lambda: pusher.is_complete)
        for outage, step in enumerate((96, 112), start=1):
            refused.clear()
            proxy.fails = fails
            train_on(run, pusher, step)
            # The thread of an earlier test may be refused, too: only the warning is this pusher's for sure.
            wait_for(lambda lines=outage: len(refused) >= 3 and len(warnings_of(caplog)) >= lines)
            proxy.fails = lambda *request: None
            wait_for(lambda: pusher.waiting == 0)
            assert len(warnings_of(caplog)) == outage
        train_on(run, pusher, 128)
        tracked.finish(run)
        assert pusher.close().is_complete
    assert_complete(run, mlflow_server, monkeypatch)


def test_a_server_that_refuses_the_run_is_one_line(
    run: RunFolder, mlflow_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`close` does not wait for what is useless to repeat."""
    with MlflowFaultProxy(mlflow_server) as proxy:
        use(monkeypatch, proxy.uri)
        proxy.fails = lambda *request: (403, {"error_code": "PERMISSION_DENIED", "message": "no"})
        pusher = Pusher(run)
        pusher.begin()
        wait_for(lambda: warnings_of(caplog))
        assert pusher.close(patience_s=10 * LONG_S) == Delivery(None, False)
        assert len(warnings_of(caplog)) == 1


@pytest.mark.slow
def test_a_server_that_starts_late_and_is_killed_gets_everything(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It loses everything in between, as if somebody had deleted its folder."""
    server = servers.MlflowServer(tmp_path / "server")
    use(monkeypatch, server.uri)
    pusher = Pusher(run)
    pusher.begin()
    wait_for(lambda: warnings_of(caplog))
    with server:
        wait_for(lambda: pusher.is_complete)
        assert has_pushed(server.uri, run, 64)
        server.kill()
        shutil.rmtree(server.folder)
        train_on(run, pusher, 96)
        server.start()
        wait_for(lambda: pusher.waiting == 0)
        assert has_pushed(server.uri, run, 96)
        train_on(run, pusher, 128)
        tracked.finish(run)
        assert pusher.close().is_complete
        assert_complete(run, server.uri, monkeypatch)


# A database as a file.


@pytest.mark.slow
def test_a_locked_database_is_waited_for(
    run: RunFolder, database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As by another `mlflow ui` that migrates it, or by a backup."""
    uri = tracking_uri()
    pusher = Pusher(run)
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        pusher.begin()
        wait_for(lambda: warnings_of(caplog))
        train_on(run, pusher, 128)
    tracked.finish(run)
    assert pusher.close().is_complete
    (line,) = warnings_of(caplog)
    assert "locked" in line and "\n" not in line
    assert_complete(run, uri, monkeypatch)


def test_a_database_deleted_while_training_gets_everything(
    run: RunFolder,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    uri = tracking_uri()
    pusher = Pusher(run)
    pusher.begin()
    wait_for(lambda: pusher.is_complete)
    database.unlink()
    train_on(run, pusher, 128)
    tracked.finish(run)
    assert pusher.close().is_complete
    assert_complete(run, uri, monkeypatch)
    output = capfd.readouterr()
    assert "Traceback" not in output.out + output.err + caplog.text


# Storage.


def test_storage_that_does_not_answer_is_waited_for(
    s3_server: servers.S3Server,
    s3_bucket: str,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri = tracking_uri()
    run = tracked.write_run(f"{s3_bucket}/runs")
    with FaultyProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        behind = RunFolder(run.name, storage.resolve(run.location.uri), run.key)
        proxy.switch("down")
        pusher = Pusher(behind)
        pusher.begin()
        wait_for(lambda: warnings_of(caplog))
        proxy.switch("pass")
        assert pusher.close().is_complete
    (line,) = warnings_of(caplog)
    assert run.location.uri in line
    assert_complete(run, uri, monkeypatch)


def test_close_does_not_wait_for_a_folder_that_cannot_be_read(
    run: RunFolder, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.location.child(run_folder.CARD).write(b"{")
    with pytest.raises(UserError):
        push(run)
    assert within(LONG_S, lambda: Pusher(run).close(patience_s=10 * LONG_S)) == Delivery(None, False)
    (line,) = warnings_of(caplog)
    assert run.location.child(run_folder.CARD).uri in line
