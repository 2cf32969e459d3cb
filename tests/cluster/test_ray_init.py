"""One-line errors for a Ray cluster that cannot be joined or started, or that dies."""

import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from support.processes import REPO, Background, paused, program, run_job

from ddpm.cluster import ray_init
from ddpm.utils import openmp
from ddpm.utils.errors import UserError


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


def address(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def answer(listener: socket.socket, reply: bytes) -> None:
    """Send `reply` to whoever connects first, from a thread."""

    def serve() -> None:
        with suppress(OSError), listener.accept()[0] as connection:  # who asks may leave before
            connection.recv(999)
            connection.sendall(reply)

    listener.listen()
    threading.Thread(target=serve, daemon=True).start()


def error_of_connect(monkeypatch: pytest.MonkeyPatch, ray_address: str | None) -> str:
    """The error message of `connect` with this RAY_ADDRESS."""
    environment = dict(os.environ) | ({"RAY_ADDRESS": ray_address} if ray_address else {})
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(UserError) as raised:
        ray_init.connect()
    message_text = str(raised.value)
    assert "\n" not in message_text and len(message_text) < 600
    assert raised.value.exit_code == 1
    return message_text


@pytest.mark.parametrize(
    ("is_joined", "error", "message"),
    [
        (
            False,
            RuntimeError("Failed to start\n raylet"),
            "Ray did not start on this machine: Failed to start raylet; ",
        ),
        (False, TimeoutError(), "Ray did not start on this machine: TimeoutError; "),
        (True, ConnectionError("x" * 9999), " cannot be joined: xxx"),
    ],
)
def test_a_failed_start_of_ray_is_a_one_line_error(
    is_joined: bool, error: Exception, message: str, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise error

    answer(listener, ray_init.HTTP2_FRAME)
    monkeypatch.setattr(ray, "init", fail)
    assert message in error_of_connect(monkeypatch, address(listener) if is_joined else None)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refused", "[Errno 111] Connection refused"),
        ("dropped", "timed out"),
        ("hung", "timed out"),
        ("other", "another program than Ray listens there"),
    ],
)
def test_unreachable_address_is_a_one_line_error(
    fault: str,
    reason: str,
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ray itself would retry for minutes. Packets to a listener with a full queue are dropped; the kernel accepts a
    connection to a process that hangs."""
    unreachable = address(listener)
    if fault == "other":
        answer(listener, b"-ERR unknown command 'PRI'")
    elif fault != "refused":  # else the port stays bound, so that no other process listens there, and refuses
        listener.listen(0 if fault == "dropped" else 1)
    monkeypatch.setattr(ray_init, "REACH_TIMEOUT_S", 0.5)
    with socket.socket() as first, socket.socket() as second:
        for waiting in (first, second) if fault == "dropped" else ():
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", listener.getsockname()[1]))
        message_text = error_of_connect(monkeypatch, unreachable)
    assert message_text == f"the Ray cluster at RAY_ADDRESS={unreachable} cannot be joined: {reason}"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("reply", "is_joined"),
    [(ray_init.HTTP2_FRAME, True), (b"HTTP/1.1 400 Bad Request", False), (None, False)],
    ids=["ray", "other", "refused"],
)
def test_the_cluster_of_ray_start_is_joined_if_ray_answers(
    reply: bytes | None,
    is_joined: bool,
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, object] = {}

    def stop(**options: object) -> None:
        given.update(options)
        raise RuntimeError("far enough")

    if reply is not None:
        answer(listener, reply)
    where = address(listener)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(where)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "init", stop)
    error = error_of_connect(monkeypatch, None)
    assert given["address"] == (where if is_joined else "local")
    assert (where in error and "ray stop --force" in error) == is_joined
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("cluster ") and where in line


FEW_IMAGES = """--train.total-images 256 --train.batch-size 32 --train.micro-batch-size 16 --train.held-out-images 16
    --sample.num-images 4 --sample.num-sample-steps 5 --run.tracking none --workers 1""".split()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_cluster_of_ray_start_that_hangs_or_is_gone(tmp_path: Path) -> None:
    """Its address stays in Ray's folder for temporary files, and Ray itself would try to join it for ever."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        env = {"RAY_TMPDIR": folder}
        file = Path(folder, "ray/ray_current_cluster")
        options = "--include-dashboard false --port 0 --min-worker-port 0 --max-worker-port 0 --num-cpus 1"
        words = [program("ray"), "start", "--head", "--block", "--disable-usage-stats", *options.split()]
        with Background(words, log=tmp_path / "head.log", env=env) as head:
            head.wait_for(lambda: file.exists() and file.read_text())
            lost = file.read_text()
            with paused(psutil.Process(head.process.pid).children(recursive=True)):
                done = run_job("train", "digits", *FEW_IMAGES, cwd=tmp_path, env=env)
        assert done.returncode == 1
        (error,) = done.stderr.splitlines()
        assert error.startswith("error: ") and lost in error and "ray stop --force" in error
        done = run_job("train", "digits", *FEW_IMAGES, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    (notice,) = [line for line in done.stdout.splitlines() if lost in line]
    assert notice.startswith("cluster ")


MANY_ACTORS = """
from ddpm.cli import parsing

class Idle:
    pass

def main():
    import time, ray
    from ddpm.cluster import ray_init

    ray_init.connect()
    actors = [ray.remote(num_cpus=0)(Idle).remote() for _ in range(40)]
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    time.sleep(1)  # time for warnings
    print("joined", flush=True)
    time.sleep(600)

parsing.run(main)
"""


@pytest.mark.slow
def test_a_cluster_prints_one_line_when_it_dies_and_no_warning_before(tmp_path: Path) -> None:
    """Ray does not warn of many processes. It may print the last twenty lines of the raylet's log. Nobody else may read
    the cluster's token."""
    words = (sys.executable, "-c", MANY_ACTORS)
    token = tmp_path / ".ray/auth_token"
    env = {"PYTHONPATH": str(REPO), "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    with Background(words, log=tmp_path / "log", env=env) as job:
        job.wait_for(lambda: job.output == "joined\n")
        assert token.stat().st_mode & 0o777 == 0o600
        (raylet,) = [c for c in psutil.Process(job.process.pid).children() if c.name() == "raylet"]
        raylet.kill()
        assert job.wait() == 1
    _, *lines = job.output.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error.startswith("error: the Ray cluster on this machine is gone: ")
    others = [line for line in lines if line != error]
    assert not others or "Raylet is terminated." in others[0]
    assert "Traceback" not in job.output


@pytest.mark.parametrize(
    ("given", "waiting"),
    [
        ({}, {"GOMP_SPINCOUNT": openmp.SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "passive"}, {"OMP_WAIT_POLICY": "passive"}),
    ],
)
def test_workers_get_the_openmp_settings_of_the_driver(
    given: dict[str, str], waiting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/", "MALLOC_ARENA_MAX": "2", **given})
    openmp.bound_spinning()
    assert ray_init.worker_env() == {"MALLOC_ARENA_MAX": "2", **waiting}
