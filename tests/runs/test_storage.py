"""Folders and real S3 behave the same, and storage errors are one line that a user can act on."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from support import proxy, servers
from support.processes import wait_for

from ddpm.runs import s3, storage
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError


@pytest.fixture
def root(root_uri: str) -> Location:
    return storage.resolve(root_uri)


@pytest.mark.lowest
def test_written_data_is_read_back(root: Location) -> None:
    data = bytes(range(256)) * 1000
    file = root.child("a").child("b.bin")
    assert not file.exists()
    file.write(b"")
    assert file.exists() and file.read() == b""
    file.write(data)
    assert file.read() == data
    assert (file.uri, file.path) == (f"{root.uri}/a/b.bin", f"{root.path}/a/b.bin")
    assert storage.resolve(file.uri).read() == data


def test_folders_are_listed_in_order_without_files(root: Location) -> None:
    assert root.folders() == []
    for name in ("b/x", "a/x", "c", "a/deeper/x"):
        root.child(name).write(b"x")
    assert root.folders() == ["a", "b"]
    assert root.child("a").folders() == ["deeper"]
    assert root.child("a").exists()


def test_delete_removes_only_its_folder(root: Location) -> None:
    root.child("gone/deep/x").write(b"x")
    root.child("gone-not/x").write(b"x")
    root.child("gone").delete()
    root.child("gone").delete()  # it does not exist: nothing to do
    assert not root.child("gone").exists()
    assert not root.child("gone/deep/x").exists()
    assert root.child("gone-not/x").read() == b"x"


@pytest.mark.parametrize("name", ["with space", "a#b", "a?b=c", "100%", "größe"])
def test_special_characters_in_names_survive(root: Location, name: str) -> None:
    root.child(name).child("x").write(b"x")
    assert root.folders() == [name]
    again = storage.resolve(f"{root.uri}/{name}")
    assert again.path == f"{root.path}/{name}"
    assert again.child("x").read() == b"x"


def test_a_local_folder_becomes_absolute(tmp_path: Path) -> None:  # every test runs in its tmp_path
    assert storage.absolute("runs/a") == str(tmp_path / "runs/a")
    assert storage.absolute("file:///data/runs") == "/data/runs"
    assert storage.absolute((tmp_path / "a #1").as_uri()) == str(tmp_path / "a #1")
    assert storage.absolute("~/runs") == str(Path.home() / "runs")
    assert storage.absolute("s3://bucket/runs") == "s3://bucket/runs"
    assert storage.resolve("runs").path == str(tmp_path / "runs")
    assert storage.resolve("file:///data").is_local


@pytest.mark.parametrize(("uri", "message"), [
    ("gs://bucket/x", "gs://bucket/x.*unknown scheme 'gs'"),
    ("s3://", "names no bucket"),
    ("runs/a\0b", r"'runs/a\\x00b' has a NUL character"),
    ("s3://bucket/a\0b", "has a NUL character"),
    ("s3:///prefix", "names no bucket"),
    ("s3://bucket//runs", "has an empty part, //"),
    ("~no-such-user/runs", "^~no-such-user/runs: "),
])  # fmt: skip
def test_an_invalid_uri_is_a_user_error(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        storage.resolve(uri)


NOTHING = "/nowhere/none"
UNREACHABLE: list[Any] = [
    ("s3://no-such-bucket/runs", {}, "bucket 'no-such-bucket' does not exist"),
    ("s3://No Bucket/runs", {}, "s3://No Bucket/runs"),
    ("s3://bucket", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "'bucket'.*403"),
    (
        "s3://bucket",
        dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
        | {"AWS_SHARED_CREDENTIALS_FILE": NOTHING, "AWS_CONFIG_FILE": NOTHING},
        "credentials",
    ),
    *(
        ("s3://bucket/runs", {"AWS_ENDPOINT_URL": url}, rf"^s3://bucket/runs: cannot reach S3: .*{url}")
        for url in ("http://127.0.0.1:9", "http://no-such-host.invalid:8333", "127.0.0.1:9")
    ),
]


@pytest.mark.parametrize(("uri", "environment", "message"), UNREACHABLE)
def test_a_bucket_that_cannot_be_used_is_a_one_line_error(
    s3_server: servers.S3Server,
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
    environment: dict[str, str | None],
    message: str,
) -> None:
    for name, value in (s3_server.client_env | environment).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(UserError, match=message) as raised:
        storage.resolve(uri)
    assert "\n" not in str(raised.value) and "wrong" not in str(raised.value)


def test_a_bucket_is_used_in_its_own_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """By moto: the S3 server of the other tests has one region."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with mock_aws():
        where: Any = {"LocationConstraint": "eu-central-1"}
        boto3.client("s3", "eu-central-1").create_bucket(Bucket="abroad", CreateBucketConfiguration=where)
        filesystem: Any = storage.resolve("s3://abroad/runs").filesystem
    assert filesystem.region == "eu-central-1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("use", "slow_down", "black_hole"),
    [(Location.exists, "503", "the last 3 sec"), (Location.read, "SlowDown", "Read timeout")],
    ids=["pyarrow", "boto3"],
)
def test_a_pickled_location_keeps_its_retries_and_time_outs(
    s3_server: servers.S3Server,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[[Location], object],
    slow_down: str,
    black_hole: str,
) -> None:
    """Workers get the location pickled."""
    with proxy.FaultyProxy(s3_server.endpoint) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.endpoint)
        monkeypatch.setattr(s3, "REQUEST_TIMEOUT_S", 3.0)
        location = storage.resolve(s3_bucket).child("x")
        location.write(b"x")
        s3.client.cache_clear()
        for mode, answer in {"slow_down": slow_down, "black_hole": black_hole}.items():
            faulty.switch(mode)  # type: ignore[arg-type]
            for held in (location, pickle.loads(pickle.dumps(location))):
                before = faulty.requests[mode]
                with pytest.raises(OSError, match=answer):
                    use(held)
                wait_for(lambda mode=mode, all_three=before + 3: faulty.requests[mode] == all_three)
