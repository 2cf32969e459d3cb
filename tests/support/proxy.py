"""A proxy in front of an HTTP server that injects faults on demand, as S3 shows them, to test clients.

The modes, switched while it runs:

    pass        forwards
    reset       RST instead of an answer
    slow_down   503 with S3's SlowDown
    delay       forwards, later
    black_hole  accepts and never answers
    down        refuses connections

Requests are forwarded unchanged: the signature covers the Host header that the client sent.
"""

import asyncio
import contextlib
import re
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

Mode = Literal["pass", "reset", "slow_down", "delay", "black_hole", "down"]
CHUNK_BYTES, HEAD_BYTES, BACKLOG = 1 << 16, 1 << 18, 512
SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message><RequestId>0</RequestId></Error>"""


class FaultyProxy:
    """A proxy on a free loopback port, in a thread of its own; any number of processes may use it at once.

    Args:
        upstream: where requests go: "http://127.0.0.1:8333".
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._port = 0
        self._mode: Mode = "pass"
        self._every, self._delay_s, self._count = 1, 0.0, 0
        self._trap: tuple[re.Pattern[str], Callable[[], object]] | None = None
        self._listener: socket.socket | None = None
        self._connections: dict[
            asyncio.Task[None], asyncio.Event
        ] = {}  # a connection ends when its event is set
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)
        self.requests: Counter[Mode] = Counter()
        """Number of requests by what was done to them: those that `every` lets through count as "pass"."""

    @property
    def endpoint(self) -> str:
        """For AWS_ENDPOINT_URL."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def mode(self) -> Mode:
        return self._mode

    def switch(self, mode: Mode, *, every: int = 1, delay_s: float = 2.0) -> None:
        """Apply this mode to all requests from now on, on open connections too.

        Args:
            every: apply it only to every n-th request, and forward the others (not for "down").
            delay_s: seconds that "delay" adds.
        """
        self._do(self._switch(mode, every, delay_s))

    def on_request(self, pattern: str, action: Callable[[], object]) -> None:
        """Call `action` once, when a request whose first line matches arrives, before it is forwarded.

        The request itself gets a reset: its sender is considered dead.
        """
        self._trap = re.compile(pattern), action

    @property
    def is_armed(self) -> bool:
        """Whether an `on_request` action has not been called yet."""
        return self._trap is not None

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        # An asyncio.Server that is closed leaves open what it has just accepted (Python 3.11).
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=BACKLOG)
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _switch(self, mode: Mode, every: int, delay_s: float) -> None:
        self._mode, self._every, self._delay_s = mode, every, delay_s
        if mode == "down" and self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        elif mode != "down" and self._listener is None:
            await self._listen()
        if mode == "down" or (mode == "reset" and every == 1):
            for end in self._connections.values():
                end.set()

    async def _close(self) -> None:
        await self._switch("down", 1, 0)
        await asyncio.gather(*self._connections)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(
            BlockingIOError, ConnectionAbortedError
        ):  # the client has already disconnected
            end = asyncio.Event()
            task = self._loop.create_task(self._serve(listener.accept()[0], end))
            self._connections[task] = end
            task.add_done_callback(self._connections.pop)

    async def _serve(self, accepted: socket.socket, end: asyncio.Event) -> None:
        """Serve one client connection through its own upstream connection."""
        reader, client = await asyncio.open_connection(sock=accepted, limit=HEAD_BYTES)
        server: StreamWriter | None = None
        try:
            above, server = await asyncio.open_connection(*self._upstream, limit=HEAD_BYTES)
            parts = (self._forward(reader, client, server), self._answer(above, client), end.wait())
            running = [asyncio.create_task(part) for part in parts]
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for part in running:
                part.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            if end.is_set():
                _reset(client)
        except OSError:  # the upstream server is down
            _reset(client)
        finally:
            for writer in (client, server):
                if writer is not None:
                    writer.close()

    async def _forward(self, reader: StreamReader, client: StreamWriter, server: StreamWriter) -> None:
        """Forward one request after another, each by the mode at its time."""
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if self._run_trap(head):
                return _reset(client)
            match self._next():
                case "reset" | "down":
                    return _reset(client)
                case "black_hole":
                    while await reader.read(CHUNK_BYTES):  # until the client gives up
                        pass
                    return
                case "delay":
                    await asyncio.sleep(self._delay_s)
                case "slow_down":
                    return await _slow_down(head, reader, client)
            server.write(head)
            async for data in _body(head, reader):
                server.write(data)
                await server.drain()

    async def _answer(self, above: StreamReader, client: StreamWriter) -> None:
        while data := await above.read(CHUNK_BYTES):
            if self._mode == "black_hole" and self._every == 1:
                await asyncio.Event().wait()
            client.write(data)
            await client.drain()

    def _run_trap(self, head: bytes) -> bool:
        """Whether this is the request that `on_request` waits for."""
        if self._trap is None or not self._trap[0].search(head.split(b"\r\n")[0].decode(errors="replace")):
            return False
        (_, action), self._trap = self._trap, None
        action()
        return True

    def _next(self) -> Mode:
        """The mode that applies to the next request."""
        self._count += 1
        mode: Mode = self._mode if self._count % self._every == 0 else "pass"
        self.requests[mode] += 1
        return mode


async def _slow_down(head: bytes, reader: StreamReader, client: StreamWriter) -> None:
    if (
        b"100-continue" not in head.lower()
    ):  # else the client never sends the body: it waits for "100 Continue"
        async for _ in _body(head, reader):
            pass
    answer = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    client.write(answer + b"Content-Length: %d\r\n\r\n" % len(SLOW_DOWN))
    if not head.startswith(b"HEAD "):
        client.write(SLOW_DOWN)
    await client.drain()


async def _body(head: bytes, reader: StreamReader) -> AsyncIterator[bytes]:
    """The request's body in pieces, as it comes over the wire."""
    if re.search(rb"\r\ntransfer-encoding:[^\r]*chunked", head, re.IGNORECASE):
        while True:
            size = await reader.readuntil(b"\r\n")
            length = int(size.split(b";")[0], 16)
            if length == 0:
                break
            yield size + await reader.readexactly(length + 2)
        while size != b"\r\n":  # trailers, up to an empty line
            yield size
            size = await reader.readuntil(b"\r\n")
        yield size
        return
    found = re.search(rb"\r\ncontent-length:\s*(\d+)", head, re.IGNORECASE)
    left = int(found[1]) if found else 0
    while left:
        data = await reader.read(min(left, CHUNK_BYTES))
        if not data:
            raise ConnectionResetError
        left -= len(data)
        yield data


def _reset(client: StreamWriter) -> None:
    """End the connection with RST, as a crashing server does."""
    raw = client.get_extra_info("socket")
    with contextlib.suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.transport.abort()
