"""Fixtures: hosts, and servers that the hosts can reach."""

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from support import guarded, servers
from support import hosts as making
from support.cloud import AwsServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[guarded.PostgresServer]:
    """A PostgreSQL server. Its folder is outside pytest's: as root, it runs as postgres, who cannot enter that."""
    try:
        guarded.postgres_program("postgres")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        Path(folder).chmod(0o711)
        with guarded.PostgresServer(Path(folder)) as server:
            yield server


@pytest.fixture(scope="session")
def guarded_mlflow(
    postgres: guarded.PostgresServer, s3_server: servers.S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[guarded.GuardedMlflowServer]:
    """infra/mlflow/serve on PostgreSQL and the bucket mlflow; test hosts can reach it too."""
    with contextlib.closing(boto3.client("s3", **s3_server.client_options)) as client:
        client.create_bucket(Bucket="mlflow")
    files = "s3://mlflow/files"
    folder = tmp_path_factory.mktemp("guarded-mlflow")
    server = guarded.GuardedMlflowServer(folder, postgres, files, s3_server.client_env, host="0.0.0.0")
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AwsServer]:
    with AwsServer(tmp_path_factory.mktemp("aws")) as server:
        yield server


@pytest.fixture(scope="module")
def aws(moto: AwsServer) -> AwsServer:
    """A server that emulates AWS, with an empty account."""
    moto.reset()
    return moto


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
    with servers.S3Server(
        tmp_path_factory.mktemp("s3"), secret_key=uuid.uuid4().hex, host=hosts.gateway
    ) as server:
        server.use(monkeypatch)
        with contextlib.closing(boto3.client("s3")) as client:
            client.create_bucket(Bucket="lab")
        yield server


@pytest.fixture
def mlflow_for_hosts(
    hosts: making.Hosts, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URI of an MLflow server that the hosts can reach; this process's environment points to it too."""
    with servers.MlflowServer(tmp_path_factory.mktemp("mlflow"), host=hosts.gateway) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server.uri
