"""The faulty proxy injects the faults of its mode, and keeps signatures valid."""

import gc
import multiprocessing
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError, ReadTimeoutError
from support import proxy, servers
from support.fetching import DATA, client, fetch, fetch_often

GONE = (ConnectionClosedError, EndpointConnectionError)
"""The errors that botocore raises after an RST, depending on when it arrives."""


@pytest.fixture
def faulty(s3_server: servers.S3Server) -> Iterator[proxy.FaultyProxy]:
    with proxy.FaultyProxy(s3_server.endpoint) as faulty:
        yield faulty


def test_it_forwards_and_signatures_stay_valid(faulty: proxy.FaultyProxy, s3_bucket: str) -> None:
    s3 = client(faulty.endpoint)
    s3.put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="x", Body=DATA)
    assert fetch(s3, s3_bucket) == DATA
    assert faulty.requests == {"pass": 2}


def test_connections_that_arrive_while_it_closes_are_closed(s3_server: servers.S3Server) -> None:
    """A connection left open would give a warning, which is an error here."""
    for _ in range(20):
        with proxy.FaultyProxy(s3_server.endpoint) as closing:
            parts = urlsplit(closing.endpoint)
            clients = [socket.create_connection((parts.hostname, parts.port)) for _ in range(8)]
        for sock in clients:
            sock.close()
    gc.collect()


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("reset", GONE),
        ("slow_down", ClientError),
        ("black_hole", ReadTimeoutError),
        ("down", GONE),
    ],
)
def test_a_mode_applies_to_open_connections_and_can_be_ended(
    faulty: proxy.FaultyProxy, s3_bucket: str, mode: proxy.Mode, error: Any
) -> None:
    s3 = client(faulty.endpoint)
    s3.put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="x", Body=DATA)
    for _ in range(2):
        assert fetch(s3, s3_bucket) == DATA
        faulty.switch(mode)
        with pytest.raises(error) as caught:
            fetch(s3, s3_bucket)
        if mode == "down":
            with pytest.raises(EndpointConnectionError):
                fetch(s3, s3_bucket)
        if isinstance(caught.value, ClientError):
            assert caught.value.response["Error"]["Code"] == "SlowDown"
            with pytest.raises(ClientError, match="SlowDown"):  # the body was read, or never sent
                s3.put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="x", Body=DATA)
        faulty.switch("pass")
    assert fetch(s3, s3_bucket) == DATA
    if mode in ("slow_down", "black_hole"):  # a request that is hit by RST may not have been sent completely
        assert faulty.requests[mode] == {"slow_down": 4, "black_hole": 2}[mode]


def test_a_delay_is_not_a_failure(faulty: proxy.FaultyProxy, s3_bucket: str) -> None:
    s3 = client(faulty.endpoint)
    s3.put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="x", Body=DATA)
    faulty.switch("delay", delay_s=0.5)
    assert fetch(s3, s3_bucket) == DATA
    faulty.switch("delay", delay_s=10)
    with pytest.raises(ReadTimeoutError):
        fetch(s3, s3_bucket)


@pytest.mark.parametrize("mode", ["reset", "slow_down"])
def test_only_every_third_request(faulty: proxy.FaultyProxy, s3_bucket: str, mode: proxy.Mode) -> None:
    s3 = client(faulty.endpoint, attempts=3)
    s3.put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="x", Body=DATA)
    before = faulty.requests["pass"]
    faulty.switch(mode, every=3)
    assert all(fetch(s3, s3_bucket) == DATA for _ in range(6))
    assert faulty.requests["pass"] - before == 6 and faulty.requests[mode] in (2, 3)


def test_many_processes_at_once(faulty: proxy.FaultyProxy, s3_bucket: str) -> None:
    client(faulty.endpoint).put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="x", Body=DATA)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(fetch_often, [(faulty.endpoint, s3_bucket)] * 3) == [True] * 3
    assert faulty.requests == {"pass": 16}


def test_a_stopped_server_gives_a_reset(s3_bucket: str) -> None:
    (port,) = servers.free_ports(1)
    with proxy.FaultyProxy(f"http://127.0.0.1:{port}") as faulty, pytest.raises(GONE):
        fetch(client(faulty.endpoint), s3_bucket)
