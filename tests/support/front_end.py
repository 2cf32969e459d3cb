"""An HTTP server in front of another one, for tests that answer in its place or lose its answers."""

import contextlib
import os
import socket
import struct
import sys
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from support.servers import free_ports

Answer = tuple[int, bytes, dict[str, str]]
"""Status, body and headers."""
OF_ONE_CONNECTION = ("Connection", "Expect", "Transfer-Encoding")
"""Headers that are not forwarded. The others are: a signature may cover them."""


class FrontEnd:
    """A server whose `answer` answers requests; those it leaves are forwarded. Any number of processes may use it."""

    def __init__(self, upstream: str, host: str = "127.0.0.1") -> None:
        # Not port 0: another process could take that port while this server is down.
        self.upstream = upstream
        self._where = (host, *free_ports(1))
        self._server: _Server | None = None
        self._listen()
        self.uri = f"http://{host}:{self._where[1]}"

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        """Answer a request, or return None to forward it; the names of headers are in lower case.

        Raises:
            ConnectionError: the request gets no answer but a reset connection.
        """
        raise NotImplementedError

    def forwarded(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        with contextlib.closing(HTTPConnection(urlsplit(self.upstream).netloc, timeout=300)) as connection:
            connection.request(method, path, body or None, headers)
            reply = connection.getresponse()
            return reply.status, reply.read(), dict(reply.getheaders())

    def hang_up(self) -> None:
        """End all open connections."""
        assert self._server is not None
        for connection in tuple(self._server.connections):
            with contextlib.suppress(OSError):  # it ends at this moment
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        self._server = _Server(self._where, self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _close(self) -> None:
        """Refuse connections, and end the open ones."""
        if self._server is not None:
            self._server.shutdown()
            self._thread.join()
            self.hang_up()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for them
    request_queue_size = 512

    def __init__(self, where: tuple[str, int], front: FrontEnd) -> None:
        self.front = front
        self.connections = set[socket.socket]()
        super().__init__(where, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)  # before its thread runs, so that `hang_up` finds it
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client has left
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def _answer(self) -> None:
        body = self._body()
        for name in OF_ONE_CONNECTION:
            del self.headers[name]
        headers = {name.lower(): value for name, value in self.headers.items()}
        headers["x-forwarded-for"] = str(self.client_address[0])
        request = (self.command, self.path, headers, body)
        try:
            status, data, answered = self.server.front.answer(*request) or self.server.front.forwarded(
                *request
            )
        except ConnectionError:
            return self._reset()
        self.send_response_only(status)
        answered = {"Content-Length": str(len(data))} | {k.title(): v for k, v in answered.items()}
        for name, value in answered.items():
            if name not in OF_ONE_CONNECTION:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

    def _body(self) -> bytes:
        if "Transfer-Encoding" not in self.headers:
            return self._read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self._line().partition(b";")[0], 16):
            parts.append(self._read(size))
            self._line()
        while self._line().strip():  # trailers
            pass
        self.headers["Content-Length"] = str(sum(map(len, parts)))
        return b"".join(parts)

    def _read(self, count: int) -> bytes:
        data = self.rfile.read(count)
        if len(data) < count:
            raise ConnectionResetError("the client has left")
        return data

    def _line(self) -> bytes:
        line = self.rfile.readline()
        if not line:
            raise ConnectionResetError("the client has left")
        return line

    def _reset(self) -> None:
        """End the connection with RST, as a crashing server does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
