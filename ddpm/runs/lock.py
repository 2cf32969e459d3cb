"""A lock for the one driver of a run or a search: a file in its folder, which the driver rewrites every BEAT_S.

It works on disk and on S3, also for drivers on different clusters. Clocks of two machines are never compared: a
lock is abandoned when its file has not changed for PATIENCE_S of the reader's monotonic time, or when its holder was a
process of this machine that has ended.

A holder that was suspended for longer may still write before its next beat: what correctness rests on is in
generations.py.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Self

from ddpm.runs.generations import Superseded
from ddpm.runs.shared_file import Version, shared_file
from ddpm.runs.storage import Location
from ddpm.utils import process
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error, retry_io

BEAT_S = 1.5
PATIENCE_S = 6.0
"""A lock whose file does not change for this long is abandoned."""
S3_BEAT_S = 5.0
"""Each beat is two requests, and a version of the file in a bucket that keeps versions."""
S3_PATIENCE_S = 20.0
RELEASE_TIMEOUT_S = 5.0
"""Time-out for removing the file."""
FILE = "driver.json"


class DriverLock:
    """A context in which this process alone drives the run or search in a folder.

    A holder that does not write for its patience loses the lock, even if it still runs; its next beat sets `is_lost`.

    Args:
        folder: the folder of the run or the search.
        what: "run" or "search", for the error.
        flag: the flag that names the run or search.
        notify: called with a line if another driver may hold the lock: its host and pid, and how long this one waits.
        waits: wait for another holder as long as it lives, instead of refusing.
        is_wanted: called while this one waits; if it returns False, waiting ends as if `waits` were False.
    """

    def __init__(
        self,
        folder: Location,
        what: str,
        flag: str,
        notify: Callable[[str], object],
        *,
        waits: bool = False,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.is_lost = False
        """Whether another process has taken over the lock."""
        self.id = uuid.uuid4().hex
        """Identifies this holder."""
        self._beat_s = BEAT_S if folder.is_local else S3_BEAT_S
        self._patience_s = PATIENCE_S if folder.is_local else S3_PATIENCE_S
        self._location = folder.child(FILE)
        self._uri = folder.child(FILE).uri
        self._what = what
        self._flag = flag
        self._notify = notify
        self._waits = waits
        self._is_wanted = is_wanted
        self._since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ddpm-driver-lock", daemon=True)

    def __enter__(self) -> Self:
        with as_user_error(f"cannot read or write {self._uri}"):
            self._file = shared_file(self._location)
            while not self._file.replace(self._abandoned(), self._card()):
                pass  # another process was faster: it holds the lock now
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError, UserError):  # then the file stays, and is found abandoned later
            retry_io(self._release, where=self._uri, timeout_s=RELEASE_TIMEOUT_S)

    def check(self) -> None:
        """Raise Superseded if another process has taken the lock over."""
        if self.is_lost:
            raise Superseded(f"{self._uri}: another process has taken over this {self._what}; this one stops")

    def _abandoned(self) -> Version | None:
        """Wait until the lock counts as abandoned; return its version, or None if there is no file."""
        version = self._file.read()
        if version is None or _process(version) == "gone":
            return version
        until = (
            "until it is done" if self._waits else f"{self._patience_s:.0f} s to see whether it still runs"
        )
        self._notify(f"{self._uri} belongs to another driver ({_holder(version)}); waiting {until}")
        began = time.monotonic()
        changed = began
        now = began
        patience = self._patience_s
        while now - changed < patience or (self._waits and _is_other(version)):
            still_runs = now - began >= patience and now - changed < patience / 2
            if (still_runs and not self._waits) or not self._is_wanted():
                raise self._refusal(version)
            time.sleep(self._beat_s / 4)
            read_at = time.monotonic()
            before = version
            version = self._file.read()
            if version is None or _process(version) == "gone":
                return version
            now = time.monotonic()
            changed = now if version != before else changed
            # On slow storage a beat takes longer by two requests (read and write).
            patience = max(patience, 4 * (self._beat_s + 2 * (now - read_at)))
        if _is_other(version):  # stopped, for example by Ctrl-Z
            raise self._refusal(version)
        return version

    def _refusal(self, version: Version) -> UserError:
        return UserError(
            f"{self._uri}: another process drives this {self._what} ({_holder(version)}); wait for it, stop it, or "
            f"give this one another {self._flag}"
        )

    def _beat(self) -> None:
        while not self._over.wait(self._beat_s):
            with contextlib.suppress(OSError, UserError):  # storage fails, for other drivers as well
                version = self._file.read()
                if version is not None and _parsed(version).get("id") != self.id:
                    self.is_lost = True
                    return
                self._file.replace(version, self._card())  # if this fails, the next read shows why

    def _release(self) -> None:
        version = self._file.read()
        if version is not None and _parsed(version).get("id") == self.id:
            self._file.replace(version, None)

    def _card(self) -> bytes:
        self._beats += 1
        card = {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self._since,
            "process": process.token(),
            "beats": self._beats,
        }
        return (json.dumps(card) + "\n").encode()


def _parsed(version: Version) -> dict[str, Any]:
    try:
        card = json.loads(version.data)
    except ValueError:
        return {}
    return card if isinstance(card, dict) else {}


def _holder(version: Version) -> str:
    card = _parsed(version)
    return f"host {card.get('host')}, pid {card.get('pid')}, since {card.get('since')}"


def _is_other(version: Version) -> bool:
    """Whether another process of this machine, which still exists, wrote `version`."""
    return _process(version) == "running" and _parsed(version).get("pid") != os.getpid()


def _process(version: Version) -> str:
    """The `process.state` of the process that wrote `version`."""
    return process.state(str(_parsed(version).get("process")))
