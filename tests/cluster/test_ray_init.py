"""A cluster that cannot be had, or that dies, is a line."""

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
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        yield listener


def address(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def refusal(monkeypatch: pytest.MonkeyPatch, ray_address: str | None) -> str:
    """What `connect` says, with that RAY_ADDRESS."""
    environment = dict(os.environ) | ({"RAY_ADDRESS": ray_address} if ray_address else {})
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(UserError) as raised:
        ray_init.connect()
    said = str(raised.value)
    assert "\n" not in said and len(said) < 600
    assert raised.value.exit_code == 1
    return said


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
def test_ray_that_does_not_start_is_a_line(
    is_joined: bool, error: Exception, message: str, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    assert message in refusal(monkeypatch, address(listener) if is_joined else None)


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "dropped"])
def test_an_address_of_nobody_is_a_line(
    silent: bool, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray would try for minutes. Packets to a listener whose queue is full are dropped."""
    nobody = address(listener)
    if not silent:
        listener.close()
    monkeypatch.setattr(ray_init, "REACH_TIMEOUT_S", 0.5)
    with socket.socket() as first, socket.socket() as second:
        for waiting in (first, second) if silent else ():
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", listener.getsockname()[1]))
        said = refusal(monkeypatch, nobody)
    reason = "timed out" if silent else "[Errno 111] Connection refused"
    assert said == f"the Ray cluster at RAY_ADDRESS={nobody} cannot be joined: {reason}"
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_cluster_that_dies_is_a_line(tmp_path: Path) -> None:
    """Ray itself prints the last twenty lines of a raylet's log, before or after; nobody else says a word."""
    joins = "import time; from ddpm.cluster import ray_init; ray_init.connect(); print('joined', flush=True)"
    words = (sys.executable, "-c", f"{joins}; time.sleep(600)")
    with Background(words, log=tmp_path / "log", env={"PYTHONPATH": str(REPO)}) as job:
        job.wait_for(lambda: job.output == "joined\n")
        (raylet,) = [c for c in psutil.Process(job.process.pid).children() if c.name() == "raylet"]
        raylet.kill()
        assert job.wait(30) == 1
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
def test_workers_of_a_joined_cluster_find_what_holds_here(
    given: dict[str, str], waiting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/", "MALLOC_ARENA_MAX": "2", **given})
    openmp.bound_spinning()
    assert ray_init.worker_env() == {"MALLOC_ARENA_MAX": "2", **waiting}
