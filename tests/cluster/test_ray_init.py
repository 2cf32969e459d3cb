"""One-line errors for a Ray cluster that cannot be joined or started, or that dies."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from support.processes import REPO, Background

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

    listener.listen()
    monkeypatch.setattr(ray, "init", fail)
    assert message in error_of_connect(monkeypatch, address(listener) if is_joined else None)


@pytest.mark.parametrize("is_dropped", [False, True], ids=["refused", "dropped"])
def test_unreachable_address_is_a_one_line_error(
    is_dropped: bool,
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ray itself would retry for minutes. Packets to a listener with a full queue are dropped."""
    unreachable = address(listener)
    if is_dropped:  # else the port stays bound, so that no other process listens there, and refuses
        listener.listen(0)
    monkeypatch.setattr(ray_init, "REACH_TIMEOUT_S", 0.5)
    with socket.socket() as first, socket.socket() as second:
        for waiting in (first, second) if is_dropped else ():
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", listener.getsockname()[1]))
        message_text = error_of_connect(monkeypatch, unreachable)
    reason = "timed out" if is_dropped else "[Errno 111] Connection refused"
    assert message_text == f"the Ray cluster at RAY_ADDRESS={unreachable} cannot be joined: {reason}"
    assert capfd.readouterr() == ("", "")


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
