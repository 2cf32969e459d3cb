"""Folders and real S3 behave the same, and storage errors are one line that a user can act on."""

import pickle
import threading
from pathlib import Path

import boto3
import pytest
from support import proxy, servers

from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    uri = (
        str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3_bucket") + "/root"
    )
    return locations.resolve(uri)


@pytest.fixture
def s3_environment(s3_server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment of the S3 server, without a bucket."""
    for name, value in s3_server.client_env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


def test_written_data_is_read_back(root: Location) -> None:
    data = bytes(range(256)) * 1000
    file = root.child("a").child("b.bin")
    assert not file.exists()
    file.write(b"old")
    file.write(data)
    assert file.exists()
    assert file.read() == data
    assert (file.uri, file.path) == (f"{root.uri}/a/b.bin", f"{root.path}/a/b.bin")
    assert locations.resolve(file.uri).read() == data


def test_an_empty_file_exists(root: Location) -> None:
    root.child("empty").write(b"")
    assert root.child("empty").exists()
    assert root.child("empty").read() == b""


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
    again = locations.resolve(f"{root.uri}/{name}", check=False)
    assert again.path == f"{root.path}/{name}"
    assert again.child("x").read() == b"x"


def test_writing_a_file_on_disk_is_atomic(tmp_path: Path) -> None:
    file = locations.resolve(str(tmp_path)).child("f")
    whole = {bytes([i]) * 300_000 for i in range(2)}
    file.write(min(whole))
    seen, stop = set(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(Path(file.path).read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(100):
        for data in whole:
            file.write(data)
    stop.set()
    reader.join()
    assert seen <= whole
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken" / "by").mkdir(parents=True)
    with pytest.raises(OSError):
        locations.resolve(str(tmp_path)).child("taken").write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_local_folder_becomes_absolute(tmp_path: Path) -> None:  # every test runs in its tmp_path
    assert locations.absolute("runs/a") == str(tmp_path / "runs/a")
    assert locations.absolute("file:///data/runs") == "/data/runs"
    assert locations.absolute((tmp_path / "a #1").as_uri()) == str(tmp_path / "a #1")
    assert locations.absolute("~/runs") == str(Path.home() / "runs")
    assert locations.absolute("s3://bucket/runs") == "s3://bucket/runs"
    assert locations.resolve("runs").path == str(tmp_path / "runs")
    assert locations.resolve("file:///data").is_local


@pytest.mark.parametrize(("uri", "message"), [
    ("gs://bucket/x", r"'gs://bucket/x': unknown scheme 'gs'; expected a folder or s3://bucket/prefix"),
    ("https://host/x", "unknown scheme 'https'"),
    ("s3://", "names no bucket"),
    ("s3:///prefix", "names no bucket"),
])  # fmt: skip
def test_an_invalid_uri_is_a_user_error(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        locations.resolve(uri)


def error_of_resolve(uri: str) -> str:
    """The error message of `resolve`; it must come within seconds, so that a hang fails too."""
    messages: list[str] = []

    def try_resolve() -> None:
        try:
            locations.resolve(uri)
        except UserError as error:
            messages.append(str(error))

    thread = threading.Thread(target=try_resolve, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "no answer in 30 s"
    assert len(messages) == 1, "nothing was refused"
    assert "\n" not in messages[0]
    return messages[0]


def test_the_answer_of_s3_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert locations.resolve("s3://bucket/a/b/", check=False).path == "bucket/a/b"


@pytest.mark.usefixtures("s3_environment")
def test_a_missing_bucket_is_an_error_with_its_name() -> None:
    assert "bucket 'no-such-bucket' does not exist" in error_of_resolve("s3://no-such-bucket/runs")


@pytest.mark.usefixtures("s3_environment")
def test_an_invalid_bucket_name_is_a_one_line_error() -> None:
    assert "s3://No Bucket/runs" in error_of_resolve("s3://No Bucket/runs")


def test_a_wrong_secret_is_reported(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    messages = error_of_resolve(s3_bucket)
    assert "S3 refuses access" in messages
    assert "HTTP 403" in messages
    assert "wrong" not in messages


@pytest.mark.usefixtures("s3_environment")
def test_missing_credentials_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    assert "credentials" in error_of_resolve("s3://bucket")


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid:8333", "127.0.0.1:9"]
)
@pytest.mark.usefixtures("s3_environment")
def test_an_endpoint_that_does_not_answer_is_reported(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    messages = error_of_resolve("s3://bucket/runs")
    assert messages.startswith("s3://bucket/runs: cannot reach S3: ")
    assert endpoint in messages


@pytest.mark.slow
def test_a_pickled_location_keeps_its_retries_and_time_outs(
    s3_server: servers.S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers get the location pickled."""
    with proxy.FaultyProxy(s3_server.endpoint) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.endpoint)
        monkeypatch.setattr(locations, "S3_REQUEST_TIMEOUT_S", 3.0)
        location = locations.resolve(s3_bucket, check=False).child("x")
        location.write(b"x")
        for mode, answer in (
            ("slow_down", "503"),
            ("black_hole", "Less than 1 bytes/sec transferred the last 3 sec"),
        ):
            faulty.switch(mode)
            for held in (location, pickle.loads(pickle.dumps(location))):
                before = faulty.requests[mode]
                with pytest.raises(OSError, match=answer):
                    held.read()
                assert faulty.requests[mode] - before == 3
