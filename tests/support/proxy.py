"""A proxy in front of an HTTP server that injects faults on demand, as S3 shows them, to test clients.

The modes, switched while it runs:

    pass        forwards
    reset       RST instead of an answer
    slow_down   503 with S3's SlowDown
    delay       forwards, later
    black_hole  accepts and never answers
    down        refuses connections
"""

import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import Literal

from support.front_end import Answer, FrontEnd

Mode = Literal["pass", "reset", "slow_down", "delay", "black_hole", "down"]
SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message><RequestId>0</RequestId></Error>"""


class FaultyProxy(FrontEnd):
    """A proxy on a free loopback port; any number of processes may use it at once.

    Args:
        upstream: where requests go: "http://127.0.0.1:8333".
    """

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.mode: Mode = "pass"
        self._every = 1
        self._delay_s = 0.0
        self._lock = threading.Lock()
        self._count = 0
        self._closing = threading.Event()
        self._trap: tuple[re.Pattern[str], Callable[[], object]] | None = None
        self.endpoint = self.uri
        """For AWS_ENDPOINT_URL."""
        self.requests: Counter[Mode] = Counter()
        """Number of requests by what was done to them: those that `every` lets through count as "pass"."""

    def switch(self, mode: Mode, *, every: int = 1, delay_s: float = 2.0) -> None:
        """Apply this mode to all requests from now on, on open connections too.

        Args:
            every: apply it only to every n-th request, and forward the others (not for "down").
            delay_s: seconds that "delay" adds.
        """
        self.mode = mode
        self._every = every
        self._delay_s = delay_s
        if mode == "down":
            self._close()
        elif self._server is None:
            self._closing.clear()
            self._listen()
        elif mode == "reset" and every == 1:
            self.hang_up()

    def on_request(self, pattern: str, action: Callable[[], object]) -> None:
        """Call `action` once, when a request whose first line matches arrives, before it is forwarded.

        The request itself gets a reset: its sender is considered dead.
        """
        self._trap = re.compile(pattern), action

    @property
    def is_armed(self) -> bool:
        """Whether an `on_request` action has not been called yet."""
        return self._trap is not None

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        with self._lock:
            trap = self._trap
            if trap is not None and trap[0].search(f"{method} {path}"):
                self._trap = None
            else:
                trap = None
                self._count += 1
            mode: Mode = self.mode if self._count % self._every == 0 else "pass"
            self.requests[mode] += trap is None
        if trap is not None:
            trap[1]()
            raise ConnectionResetError
        if mode == "slow_down":
            return 503, SLOW_DOWN, {"Content-Type": "application/xml", "Connection": "close"}
        wait_s = {"delay": self._delay_s, "black_hole": None}.get(mode, 0)
        if mode in ("reset", "down") or self._closing.wait(wait_s):
            raise ConnectionResetError
        return None

    def _close(self) -> None:
        self._closing.set()
        super()._close()
