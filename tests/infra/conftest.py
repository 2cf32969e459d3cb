"""Hosts, and servers that they reach."""

import uuid
from collections.abc import Callable, Iterator

import pytest
from support import hosts as making
from support import servers


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[making.Hosts]:
    """An empty network."""
    if reason := making.missing():
        pytest.skip(reason)
    with making.Hosts(tmp_path_factory.mktemp("hosts")) as network:
        yield network


@pytest.fixture
def s3_for_hosts(
    hosts: making.Hosts, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[servers.S3Server]:
    """An S3 server with a bucket `lab` that the hosts reach; this process's environment leads to it, too.

    Its secret key is one that nothing says by chance.
    """
    import boto3

    with servers.S3Server(
        tmp_path_factory.mktemp("s3"), secret_key=uuid.uuid4().hex, host=hosts.gateway
    ) as server:
        for name, value in server.client_env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers the first credentials it saw
        client = boto3.client("s3")
        client.create_bucket(Bucket="lab")
        client.close()
        yield server


@pytest.fixture
def mlflow_for_hosts(
    hosts: making.Hosts, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URI of an MLflow server that the hosts reach; this process's environment leads to it, too."""
    with servers.MlflowServer(tmp_path_factory.mktemp("mlflow"), host=hosts.gateway) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server.uri


@pytest.fixture
def announce(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Shows a line in the terminal, whether or not the test goes well: a figure that nothing is asserted of."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}")

    return show
