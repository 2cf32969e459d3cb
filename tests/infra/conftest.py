"""Fixtures: hosts, and servers that the hosts can reach."""

import uuid
from collections.abc import Callable, Iterator

import pytest
from support import hosts as making
from support import servers


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[making.Hosts]:
    """A network without hosts."""
    if reason := making.missing():
        pytest.skip(reason)
    with making.Hosts(tmp_path_factory.mktemp("hosts")) as network:
        yield network


@pytest.fixture
def s3_for_hosts(
    hosts: making.Hosts, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[servers.S3Server]:
    """An S3 server with a bucket `lab` that the hosts can reach; this process's environment points to it too.

    Its secret key is random, so that it appears nowhere by chance.
    """
    import boto3

    with servers.S3Server(
        tmp_path_factory.mktemp("s3"), secret_key=uuid.uuid4().hex, host=hosts.gateway
    ) as server:
        for name, value in server.client_env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it caches the first credentials it sees
        client = boto3.client("s3")
        client.create_bucket(Bucket="lab")
        client.close()
        yield server


@pytest.fixture
def mlflow_for_hosts(
    hosts: making.Hosts, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URI of an MLflow server that the hosts can reach; this process's environment points to it too."""
    with servers.MlflowServer(tmp_path_factory.mktemp("mlflow"), host=hosts.gateway) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server.uri


@pytest.fixture
def announce(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Returns a function that prints a line to the terminal even if the test passes, for figures."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}")

    return show
