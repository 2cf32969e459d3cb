"""Records reach MLflow exactly once, whatever fails between training and MLflow.

Servers and uploaders are really killed; hanging and failing servers are simulated by sockets and proxies.
"""

import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from support import forked, servers
from support.processes import wait_for
from support.proxy import FaultyProxy
from support.tracked import (
    PARAMS,
    MlflowFaultProxy,
    address_at,
    assert_delivered_once,
    deliver,
    image_counts,
    names_in,
    points,
    put,
    put_records,
    run_of,
    spool_in,
    warnings_of,
)

from ddpm.storage.locations import Location
from ddpm.tracking import metrics_buffer, spool, uploader
from ddpm.tracking.mlflow_runs import Address
from ddpm.tracking.uploader import Delivery, Uploader

# Far longer than anything here takes, even on a busy machine: only a call that blocks on a server exceeds it.
PATIENCE_S = 60.0


@pytest.fixture
def address(mlflow_server: str) -> Address:
    return address_at(mlflow_server)


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server((servers.LOOPBACK, 0), backlog=50) as server:
        yield f"http://{servers.LOOPBACK}:{server.getsockname()[1]}"


@pytest.fixture
def absent_server() -> str:
    return f"http://{servers.LOOPBACK}:{servers.free_ports(1)[0]}"


@pytest.fixture
def proxy(mlflow_server: str) -> Iterator[MlflowFaultProxy]:
    with MlflowFaultProxy(mlflow_server) as proxy:
        yield proxy


def within(patience_s: float, call: Callable[[], Any]) -> Any:
    """Return what `call` returns; fail instead of hanging if it takes longer."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(patience_s)
    assert not thread.is_alive(), f"it blocks: no return in {patience_s} s"
    assert results, "it raised"
    return results[0]


# Which segments are final.


def test_a_segment_is_delivered_when_its_checkpoint_is_committed(address: Address, buffer: Location) -> None:
    uploader = Uploader(address, PARAMS, buffer)
    uploader.begin()
    for position in (64, 128):
        put(buffer, position, position)
        uploader.committed(position)
        wait_for(lambda: names_in(buffer) == [])
    assert_delivered_once(address, 64, 128)
    assert run_of(address).info.status == "RUNNING"
    uploader.close("FINISHED")


def test_the_final_flush_is_delivered_once_even_after_a_restart(address: Address, buffer: Location) -> None:
    put(buffer, 448, 384, 448)
    put(buffer, 512, 480, 512, failed=True)
    assert deliver(address, buffer, 448, "FAILED").undelivered == 0
    assert_delivered_once(address, 384, 448, 480, 512)
    put(buffer, 576, 480, 512, 544, 576)
    deliver(address, buffer, 576)
    put(buffer, 512, 480, 500, 512, failed=True)  # a late one
    deliver(address, buffer, 576)
    assert_delivered_once(address, 384, 448, 480, 500, 512, 544, 576)


def test_segments_after_the_resumed_checkpoint_are_discarded(root_uri: str) -> None:
    buffer = spool_in(root_uri)
    spool.discard_after(buffer, 64)  # the folder does not exist yet
    for position in (64, 128, 192):
        put(buffer, position, position)
    put(buffer, 100, 100, failed=True)
    buffer.child("000000000192.txt").write(b"somebody's")
    spool.discard_after(buffer, 64)
    left = [segment.path.rpartition("/")[2] for segment in spool.final(buffer, 10**9)]
    assert left == ["000000000064.zip", "000000000100-failed.zip"]
    assert spool.count(buffer, 10**9) == 4
    assert spool.count(buffer, 63) == 2
    assert buffer.child("000000000192.txt").exists()


# MLflow is down.


def test_a_server_that_is_down_blocks_nothing_and_loses_nothing(
    absent_server: str, buffer: Location, caplog: pytest.LogCaptureFixture
) -> None:
    uploader = Uploader(address_at(absent_server), PARAMS, buffer)
    within(PATIENCE_S, uploader.begin)
    put(buffer, 64, 32, 64, files=True)
    put(buffer, 128, 128)
    within(PATIENCE_S, lambda: [uploader.committed(64)])
    wait_for(lambda: len(warnings_of(caplog)) == 1)
    done = within(2 + PATIENCE_S, lambda: uploader.close("FINISHED", 2 * PATIENCE_S, patience_s=2))
    assert done == Delivery(None, None, 6, False)
    assert names_in(buffer) == ["000000000064.zip", "000000000128.zip"]
    lines = warnings_of(caplog)
    assert len(lines) == 2, lines
    assert f"MLflow at {absent_server} is not accepting data" in lines[0]
    assert f"MLflow at {absent_server} did not accept everything (6 records left)" in lines[1]


def test_a_server_that_hangs_blocks_nothing_and_loses_nothing(hanging_server: str, buffer: Location) -> None:
    put(buffer, 64, 32, 64)
    uploader = Uploader(address_at(hanging_server), PARAMS, buffer)
    within(PATIENCE_S, uploader.begin)
    within(PATIENCE_S, lambda: [uploader.committed(64)])
    time.sleep(2)  # by now its first request hangs
    done = within(2 + PATIENCE_S, lambda: uploader.close("FINISHED", 2 * PATIENCE_S, patience_s=2))
    assert done == Delivery(None, None, 4, False)
    assert names_in(buffer) == ["000000000064.zip"]


@pytest.mark.parametrize("timeout_s", [1.0, 6.0])
def test_close_starts_the_uploader_only_if_enough_time_is_left(
    absent_server: str, buffer: Location, caplog: pytest.LogCaptureFixture, timeout_s: float
) -> None:
    """MLflow takes seconds to import. If nothing is left to deliver, no warning reports zero records."""
    uploader = Uploader(address_at(absent_server), PARAMS, buffer)
    assert uploader.close("KILLED", timeout_s, patience_s=0.5) == Delivery(None, None, 0, False)
    assert not [line for line in warnings_of(caplog) if "records" in line]
    assert (uploader._thread.ident is not None) == (timeout_s > 5)


def test_close_gives_up_early_on_a_server_that_takes_nothing(absent_server: str, buffer: Location) -> None:
    put(buffer, 64, 64)
    uploader = Uploader(address_at(absent_server), PARAMS, buffer)
    uploader.committed(64)
    done = within(2 + PATIENCE_S, lambda: uploader.close("FINISHED", timeout_s=10 * PATIENCE_S, patience_s=2))
    assert done == Delivery(None, None, 2, False)


@pytest.mark.slow
def test_close_waits_for_a_slow_server_that_makes_progress(mlflow_server: str, buffer: Location) -> None:
    key = uuid.uuid4().hex
    deliver(address_at(mlflow_server, key), buffer, -1, "KILLED")  # creates the run: many requests
    for position in range(64, 321, 64):
        put(buffer, position, position)
    with FaultyProxy(mlflow_server) as slow:
        slow.switch("delay", delay_s=1.5)
        uploader = Uploader(address_at(slow.endpoint, key), PARAMS, buffer)
        uploader.committed(320)
        begin = time.monotonic()
        done = uploader.close("FINISHED", timeout_s=10 * PATIENCE_S, patience_s=20)
        assert done.undelivered == 0 and done.ended
        assert time.monotonic() > begin + 20


@pytest.mark.slow
def test_a_server_that_starts_late_gets_everything(
    tmp_path: Path, buffer: Location, caplog: pytest.LogCaptureFixture
) -> None:
    server = servers.MlflowServer(tmp_path / "late")
    address = address_at(server.uri)
    uploader = Uploader(address, PARAMS, buffer)
    uploader.begin()
    put(buffer, 64, 32, 64)
    uploader.committed(64)
    wait_for(lambda: warnings_of(caplog))
    with server:
        done = uploader.close("FINISHED")
        assert (done.undelivered, done.ended) == (0, True)
        assert_delivered_once(address, 32, 64)
    (outage,) = warnings_of(caplog)
    assert f"MLflow at {server.uri} is not accepting data" in outage


@pytest.mark.slow
def test_a_server_killed_during_delivery_gets_everything_exactly_once(
    tmp_path: Path, buffer: Location
) -> None:
    steps = list(range(8, 481, 8))
    with servers.MlflowServer(tmp_path / "killed") as server:
        address = address_at(server.uri)
        uploader = Uploader(address, PARAMS, buffer)
        uploader.begin()
        for step in steps:
            put(buffer, step, step)
        uploader.committed(steps[-1])
        for fraction in (3, 2):  # killed with two thirds left, and again with half left
            wait_for(lambda fraction=fraction: len(names_in(buffer)) < len(steps) * (fraction - 1) / fraction)
            server.kill()
            left = len(names_in(buffer))
            assert left > 0, "it was too late for the test to mean something"
            server.start()
        done = uploader.close("FINISHED")
        assert (done.undelivered, done.ended) == (0, True)
        assert names_in(buffer) == []
        assert_delivered_once(address, *steps)
        assert run_of(address).info.status == "FINISHED"


# MLflow accepts only some records.


def test_a_record_that_always_fails_does_not_block_the_others(
    proxy: MlflowFaultProxy, buffer: Location, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(method: str, path: str, body: bytes) -> tuple[int, dict[str, str]] | None:
        is_image = method == "PUT" and "step%2B64" in path.replace("+", "%2B")
        is_point = path.endswith("log-batch") and b'"poison"' in body
        return (500, {"error_code": "INTERNAL_ERROR", "message": "oh"}) if is_image or is_point else None

    proxy.fails = fails
    address = address_at(proxy.uri)
    poison = metrics_buffer.Metrics({"poison": 1.0, "sound": 2.0}, 64, 1)
    sound = [metrics_buffer.Metrics({"sound": float(step)}, step, step) for step in range(1, 33)]
    put_records(buffer, 63, *sound, poison)
    kept = put(buffer, 64, 32, 64)
    put(buffer, 128, 96, 128)
    done = deliver(address, buffer, 128)
    assert (done.undelivered, done.ended) == (33 + 4, True)
    assert names_in(buffer) == ["000000000063.zip", "000000000064.zip"]
    assert points(address, "sound") == [*((step, float(step)) for step in range(1, 33)), (64, 2.0)]
    assert [step for step, _ in points(address)] == [32, 64, 96, 128]
    assert image_counts(address) == {(step, kind): 1 for step in (32, 96, 128) for kind in ("png", "webp")}
    assert any(f"MLflow does not accept all of {kept.uri}" in line for line in warnings_of(caplog))

    proxy.fails = lambda *request: None
    done = deliver(address, buffer, 128)
    assert (done.undelivered, names_in(buffer)) == (0, [])
    assert points(address, "poison") == [(64, 1.0)]
    assert len(points(address, "sound")) == 33
    assert_delivered_once(address, 32, 64, 96, 128)


def test_records_are_kept_when_permission_is_denied(proxy: MlflowFaultProxy, buffer: Location) -> None:
    address = address_at(proxy.uri)
    uploader = Uploader(address, PARAMS, buffer)
    uploader.begin()
    put(buffer, 64, 64)
    uploader.committed(64)
    wait_for(lambda: names_in(buffer) == [])
    proxy.fails = lambda *request: (403, {"error_code": "PERMISSION_DENIED", "message": "who are you?"})
    put(buffer, 128, 128)
    uploader.committed(128)
    done = uploader.close("FINISHED")
    assert (done.undelivered, done.ended) == (2, False)
    proxy.fails = lambda *request: None
    assert deliver(address, buffer, 128).undelivered == 0
    assert_delivered_once(address, 64, 128)


def test_params_without_permission_end_the_delivery_at_once(
    proxy: MlflowFaultProxy, buffer: Location
) -> None:
    address, denied = address_at(proxy.uri), (403, {"error_code": "PERMISSION_DENIED", "message": "no"})
    proxy.fails = lambda method, path, body: denied if b"optim.lr" in body else None
    put(buffer, 64, 64)
    done = deliver(address, buffer, 64)
    assert (done.undelivered, done.ended) == (2, False)
    proxy.fails = lambda *request: None
    assert deliver(address, buffer, 64).undelivered == 0
    assert run_of(address).data.params["optim.lr"] == "0.001"


def test_a_server_that_rejects_the_run_stops_tracking_with_an_error(
    proxy: MlflowFaultProxy, buffer: Location, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.fails = lambda *request: (401, {"error_code": "UNAUTHENTICATED", "message": "who are you?"})
    put(buffer, 64, 64)
    done = deliver(address_at(proxy.uri), buffer, 64)
    assert done == Delivery(None, None, 2, False)
    assert (
        f"training continues, records are kept in {buffer.uri}: RestException: UNAUTHENTICATED" in caplog.text
    )
    assert names_in(buffer) == ["000000000064.zip"]


# Storage.


def test_a_damaged_segment_is_reported_and_kept(
    address: Address, buffer: Location, caplog: pytest.LogCaptureFixture
) -> None:
    put(buffer, 64, 64)
    damaged = put(buffer, 128, 128)
    whole = damaged.read()
    damaged.write(whole[:-9])
    put(buffer, 192, 192)
    assert deliver(address, buffer, 192).undelivered == 1
    assert_delivered_once(address, 64, 192)
    assert [line for line in warnings_of(caplog) if f"{damaged.uri} is damaged" in line]
    assert names_in(buffer) == ["000000000128.zip"]
    damaged.write(whole)
    assert deliver(address, buffer, 192).undelivered == 0
    assert_delivered_once(address, 64, 128, 192)


def test_close_waits_for_storage_that_cannot_be_read(
    address: Address, buffer: Location, tmp_path: Path
) -> None:
    """A file in place of the spool folder: listing it raises, as it does for an unreachable bucket."""
    place, other = Path(buffer.path), spool_in(tmp_path / "other")
    place.parent.mkdir()
    place.symlink_to("/dev/null")
    put(other, 64, 64)
    (tmp_path / "link").symlink_to(other.path)
    impatient = Uploader(address_at(address.uri), PARAMS, buffer)
    impatient.begin()
    done = within(1 + PATIENCE_S, lambda: impatient.close("FINISHED", timeout_s=1))
    assert done.undelivered >= 1 and not done.ended
    uploader = Uploader(address, PARAMS, buffer)
    uploader.committed(64)
    closed: list[Delivery] = []
    closing = threading.Thread(target=lambda: closed.append(uploader.close("FINISHED", patience_s=300)))
    closing.start()
    wait_for(lambda: uploader._run.run_id is not None)
    time.sleep(0.5)
    assert not closed
    (tmp_path / "link").replace(place)  # at once: an empty folder would be the end
    closing.join()
    assert (closed[0].undelivered, closed[0].ended) == (0, True)
    assert_delivered_once(address, 64)


def test_a_spool_in_a_bucket(mlflow_server: str, s3_bucket: str) -> None:
    address, buffer = address_at(mlflow_server), spool_in(f"{s3_bucket}/runs/a")
    assert deliver(address, buffer, -1).undelivered == 0  # the folder does not exist
    put(buffer, 64, 32, 64, files=True)
    put(buffer, 96, 96, failed=True)
    put(buffer, 128, 128)
    assert deliver(address, buffer, 64).undelivered == 0
    assert_delivered_once(address, 32, 64, 96)
    assert [file.path.rpartition("/")[2] for file in spool.final(buffer, 128)] == ["000000000128.zip"]


def test_segments_that_another_process_delivered_count_as_delivered(
    address: Address, buffer: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = [put(buffer, 64, 64)]
    deliver(address, buffer, 64)
    monkeypatch.setattr(uploader.spool, "final", lambda buffer, committed: stale)
    done = deliver(address, buffer, 64)
    assert (done.undelivered, done.ended) == (0, True)


def test_two_concurrent_uploaders_add_no_duplicates(address: Address, buffer: Location) -> None:
    """As when jobs/sync.py delivers while the run is still training."""
    steps = list(range(8, 161, 8))
    deliver(address, buffer, -1)
    for step in steps:
        put(buffer, step, step)
    two = [Uploader(address, PARAMS, buffer) for _ in range(2)]
    for each in two:
        each.begin()
        each.committed(steps[-1])
    wait_for(lambda: names_in(buffer) == [])
    for each in two:
        assert each.close("FINISHED").undelivered == 0
    assert_delivered_once(address, *steps)


# The uploader dies.


@pytest.mark.slow
@pytest.mark.parametrize("is_remade", [False, True])
@pytest.mark.parametrize("dies", ["once", "often"])
def test_uploaders_killed_at_any_point_deliver_everything_exactly_once(
    mlflow_server: str, tmp_path: Path, forkserver: ForkServerContext, dies: str, is_remade: bool
) -> None:
    """They die right after a change in MLflow: one run for each, or one whose uploaders die after 2, 5, 8, ... changes.

    is_remade: after each death the run resumes from an older checkpoint, and writes its segments again, later.
    """
    deaths = 0
    for number in count(1):
        address, buffer = address_at(mlflow_server), spool_in(tmp_path / str(number))
        before = deaths
        for last_change in (number, 1000) if dies == "once" else range(2, 1000, 3):
            if is_remade or deaths == before:
                time.sleep(0.002)  # so that the timestamps differ from the previous ones
                put(buffer, 64, 32, 64)
                put(buffer, 128, 96, 128, files=True)
            arguments = (address, buffer.uri, 128, last_change)
            uploader = forkserver.Process(target=forked.deliver_and_die, args=arguments)
            uploader.start()
            uploader.join()
            assert uploader.exitcode in (0, -signal.SIGKILL)
            if uploader.exitcode == 0:
                break
            deaths += 1
        assert_delivered_once(address, 32, 64, 96, 128)
        assert run_of(address).info.status == "FINISHED"
        if dies == "often" or deaths == before:
            break
    assert deaths >= (15 if dies == "once" else 3)
