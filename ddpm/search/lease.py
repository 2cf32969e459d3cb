"""One driver at a time: a small file in a search's folder that its driver rewrites every second or two.

Its own room because it holds wherever storage does, on a disk or in a bucket, whoever's cluster the drivers are on.
Time is told by the reader's own clock alone: a lease that does not change for a while belongs to somebody who is dead.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ddpm.config import UserError
from ddpm.storage import Location

BEAT_S = 1.5
PATIENCE_S = 4 * BEAT_S
"""A lease that did not change for so long is nobody's."""
FILE = "driver.json"


class Lease:
    """A context in which this process alone drives what is in a folder.

    Args:
        place: the folder.
        wait: told in a line that it must be waited whether another driver lives.

    Raises:
        UserError: another process drives it, or storage refuses.
    """

    def __init__(self, place: Location, wait: Callable[[str], object]) -> None:
        self.is_lost = False
        """Another process has taken it, since this one was silent for too long."""
        self._file, self._wait = place.child(FILE), wait
        self._id, self._beats, self._over = uuid.uuid4().hex, 0, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ddpm-lease", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._take()
        except OSError as error:
            raise UserError(f"cannot read or write {self._file.uri}: {error}") from None
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # else it is waited for PATIENCE_S
            if self._holder(self._read()) == self._id:
                self._file.filesystem.delete_file(self._file.path)

    def _take(self) -> None:
        found = self._read()
        if found is not None:
            self._wait(
                f"{self._file.uri} is of another driver; waiting {PATIENCE_S:.0f} s to see whether it lives"
            )
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                time.sleep(BEAT_S / 4)
                now = self._read()
                if now is not None and now != found:
                    whose = ", ".join(f"{key} {now.get(key)}" for key in ("host", "pid"))
                    raise UserError(
                        f"{self._file.uri}: another process drives this search ({whose}); wait for it, stop it, or "
                        "give this one another --name"
                    )
                if now is None:
                    break
        self._write()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):  # storage is away, for others as well
                found = self._read()
                if found is not None and self._holder(found) != self._id:
                    self.is_lost = True
                    return
                self._write()

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._file.read())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        self._beats += 1
        card = {"id": self._id, "host": socket.gethostname(), "pid": os.getpid(), "beats": self._beats}
        self._file.write((json.dumps(card) + "\n").encode())

    @staticmethod
    def _holder(found: dict[str, Any] | None) -> str | None:
        return found.get("id") if found else None
