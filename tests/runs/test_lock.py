"""Two processes never drive the same run or search at once, and a dead process does not keep the lock."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support import servers
from support.processes import REPO

from ddpm.runs import lock as driver_lock
from ddpm.runs import storage
from ddpm.runs.lock import DriverLock
from ddpm.runs.storage import Location
from ddpm.utils import process
from ddpm.utils.errors import UserError

HOLD = """
import sys, time
from ddpm.runs import storage
from ddpm.runs.lock import DriverLock
with DriverLock(storage.resolve(sys.argv[1]), "run", "--run.name", print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def location(root_uri: str, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setattr(driver_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(driver_lock, "PATIENCE_S", 1.0)
    return storage.resolve(root_uri)


@pytest.fixture
def patience(location: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a live holder may be late by a second."""
    monkeypatch.setattr(driver_lock, "PATIENCE_S", 3.0)


@pytest.fixture
def holder(location: Location) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    words = [sys.executable, "-c", HOLD, location.uri]
    with subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        yield other
        other.kill()


def lock(location: Location, notify: object = lambda line: None) -> DriverLock:
    return DriverLock(location, "run", "--run.name", notify)  # type: ignore[arg-type]


def foreign_lock_file(**changes: object) -> bytes:
    """The file of a lock that another machine holds."""
    return json.dumps({"id": "another", "host": "h", "pid": 1, "since": "yesterday", **changes}).encode()


@pytest.mark.usefixtures("patience")
def test_a_second_driver_is_rejected_while_the_first_is_alive(
    location: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their clocks show."""
    jumps = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "time", lambda: next(jumps) * (-1) ** next(jumps))
    with lock(location) as first:
        with pytest.raises(UserError, match=r"driver\.json.*host .*, pid \d+, since 20.* UTC"):
            lock(location).__enter__()
        assert not first.is_lost
        first.check()
    assert not location.child(driver_lock.FILE).exists()  # so that the next driver does not wait
    with lock(location, pytest.fail):
        pass


def test_the_lock_of_a_killed_process_on_this_machine_is_taken_at_once(
    location: Location, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)  # as by Ctrl-Z: suspended, not dead
    with pytest.raises(UserError, match=f"pid {holder.pid}, "):
        lock(location).__enter__()
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie: it has exited, and still has its PID
    with lock(location, pytest.fail):
        pass


def test_a_reused_pid_is_not_mistaken_for_the_holder(location: Location) -> None:
    ours = process.token()
    location.child(driver_lock.FILE).write(foreign_lock_file(pid=os.getpid(), process=ours + "1"))
    with lock(location, pytest.fail):
        pass


@pytest.mark.parametrize(
    "left", [foreign_lock_file(), foreign_lock_file(process="f00-1-1"), b"{", b"[]", b""]
)
def test_the_lock_of_a_dead_process_on_another_machine_is_taken(location: Location, left: bytes) -> None:
    location.child(driver_lock.FILE).write(left)
    lines: list[str] = []
    with lock(location, lines.append):
        assert "waiting" in lines[0] and len(lines) == 1
        assert b'"beats"' in location.child(driver_lock.FILE).read()


def test_a_lock_released_meanwhile_is_taken(location: Location) -> None:
    file = location.child(driver_lock.FILE)
    file.write(foreign_lock_file())
    with lock(location, lambda line: file.filesystem.delete_file(file.path)):
        pass


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("left", [None, foreign_lock_file()])
@pytest.mark.lowest
def test_only_one_of_many_concurrent_drivers_gets_the_lock(location: Location, left: bytes | None) -> None:
    if left is not None:
        location.child(driver_lock.FILE).write(left)
    start = threading.Barrier(6)
    won = list[DriverLock]()
    refused = list[str]()

    def take() -> None:
        mine = lock(location)
        start.wait()
        try:
            won.append(mine.__enter__())
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(start.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, start.parties - 1)
    assert not won[0].is_lost
    won[0].__exit__(None, None, None)


def test_a_suspended_holder_learns_that_it_lost_the_lock(location: Location) -> None:
    file = location.child(driver_lock.FILE)
    with lock(location) as first:
        while not first.is_lost:  # it may overwrite the file once, if it had checked just before
            file.write(foreign_lock_file())
        with pytest.raises(UserError, match="taken over"):
            first.check()
    assert file.read() == foreign_lock_file()


def test_a_storage_error_is_one_line(s3_server: servers.S3Server, s3_bucket: str) -> None:
    here = storage.resolve(s3_bucket)
    gone = replace(here, path=f"{here.path}-not-there")
    with pytest.raises(UserError, match=r"s3://.*/driver\.json: .*NoSuchBucket"):
        lock(gone).__enter__()
