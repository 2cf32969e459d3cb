"""Two processes never drive the same run or search at once, and one that is dead does not keep it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import servers
from support.processes import REPO

from ddpm.storage import driver_lock, locations
from ddpm.storage.driver_lock import DriverLock
from ddpm.storage.locations import Location
from ddpm.utils import process
from ddpm.utils.errors import UserError

HOLD = """
import sys, time
from ddpm.storage import locations
from ddpm.storage.driver_lock import DriverLock
with DriverLock(locations.resolve(sys.argv[1]), "run", "--run.name", print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["local", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Location]:
    monkeypatch.setattr(driver_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(driver_lock, "PATIENCE_S", 1.0)
    uri = str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_bucket") + "/run"
    yield locations.resolve(uri)


@pytest.fixture
def holder(place: Location) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    words = [sys.executable, "-c", HOLD, place.uri]
    with subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        yield other
        other.kill()


def lock(place: Location, notify: object = lambda line: None) -> DriverLock:
    return DriverLock(place, "run", "--run.name", notify)  # type: ignore[arg-type]


def card(**changes: object) -> bytes:
    """The file of a lock that another machine holds."""
    return json.dumps({"id": "another", "host": "h", "pid": 1, "since": "yesterday", **changes}).encode()


def test_a_second_one_is_refused_while_the_first_lives(place: Location) -> None:
    with lock(place) as first:
        with pytest.raises(
            UserError, match=r"another process drives this run \(host .*, pid \d+, since 20.* UTC"
        ):
            lock(place).__enter__()
        assert not first.is_lost
        first.check()
    assert not place.child(driver_lock.FILE).exists()  # so that the next one need not wait
    with lock(place, pytest.fail):
        pass


def test_a_killed_one_on_this_machine_is_succeeded_at_once(
    place: Location, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)  # as by Ctrl-Z: silent, and not dead
    with pytest.raises(UserError, match=rf"another process drives this run \(host .*, pid {holder.pid}, "):
        lock(place).__enter__()
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and still has its pid
    with lock(place, pytest.fail):
        pass


def test_a_pid_that_is_used_again_is_not_taken_for_the_holder(place: Location) -> None:
    ours = process.token()
    place.child(driver_lock.FILE).write(card(pid=os.getpid(), process=ours + "1"))
    with lock(place, pytest.fail):
        pass


@pytest.mark.parametrize("left", [card(), card(process="f00-1-1"), b"{", b"[]", b""])
def test_one_that_is_dead_elsewhere_is_succeeded(place: Location, left: bytes) -> None:
    place.child(driver_lock.FILE).write(left)
    lines: list[str] = []
    with lock(place, lines.append):
        assert "waiting" in lines[0] and len(lines) == 1
        assert b'"beats"' in place.child(driver_lock.FILE).read()


def test_clocks_do_not_matter(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "time", lambda: next(jumps) * (-1) ** next(jumps))
    with lock(place) as first:
        with pytest.raises(UserError, match="another process drives this run"):
            lock(place).__enter__()
        assert not first.is_lost


def test_one_that_leaves_meanwhile_is_succeeded(place: Location) -> None:
    file = place.child(driver_lock.FILE)
    file.write(card())
    with lock(place, lambda line: file.filesystem.delete_file(file.path)):
        pass


@pytest.mark.parametrize("left", [None, card()])
def test_of_many_at_once_one_gets_it(place: Location, left: bytes | None) -> None:
    if left is not None:
        place.child(driver_lock.FILE).write(left)
    start, won, refused = threading.Barrier(6), list[DriverLock](), list[str]()

    def take() -> None:
        mine = lock(place)
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


def test_one_that_was_silent_for_too_long_learns_that_another_has_it(place: Location) -> None:
    file = place.child(driver_lock.FILE)
    with lock(place) as first:
        while not first.is_lost:  # it may write over it once: it looked just before
            file.write(card())
        with pytest.raises(UserError, match="another process has taken over this run; this one stops"):
            first.check()
    assert file.read() == card()


def test_storage_that_refuses_is_one_line(s3_server: servers.S3Server, s3_bucket: str) -> None:
    gone = locations.resolve(f"{s3_bucket}-not-there", check=False)
    with pytest.raises(UserError, match=r"cannot read or write s3://.*/driver.json: .*NoSuchBucket"):
        lock(gone).__enter__()
