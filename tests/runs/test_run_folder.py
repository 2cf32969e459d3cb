"""A run keeps its key, and its newest complete checkpoint is found, on disk and in a bucket."""

import itertools
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from support import servers
from support.checkpoints import checkpoint_name
from support.front_end import Answer, FrontEnd
from support.proxy import FaultyProxy

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.runs import generations, names, run_folder, storage
from ddpm.runs.run_folder import Data, Facts, Search, Status
from ddpm.runs.storage import Location
from ddpm.training import checkpoint_manager
from ddpm.utils.errors import UserError
from ddpm.utils.files import MAX_BYTES
from ddpm.utils.retry import StorageError


def write_checkpoint(run: Location, images_seen: int, *, whole: bool = True) -> Location:
    folder = run.child(checkpoint_name(images_seen))
    folder.child("net.safetensors").write(f"net after {images_seen}".encode())
    if whole:
        folder.child("checksums.json").write(b"{}")
    return folder


def test_a_run_gets_a_key_once(root_uri: str) -> None:
    first = run_folder.open_run("a", root_uri)
    other = run_folder.open_run("b", root_uri)
    again = run_folder.open_run("a", root_uri)
    assert (again.key, again.name, again.location.uri) == (first.key, "a", f"{root_uri}/a")
    assert len({first.key, other.key}) == 2


def test_the_facts_of_a_run_are_those_of_its_beginning(root_uri: str) -> None:
    data = Data("digits", "f" * 64, f"{root_uri}/data", "train", 600, (8, 8, 1), 10)
    facts = Facts(
        preset="digits",
        changed={"optim.lr": 0.5, "model.width_multipliers": [1, 2]},
        config={"optim": {"lr": 0.5}},
        data=data,
        command="python jobs/train.py digits --lr 0.5",
        versions={"version.ddpm": "0.2"},
        search=Search("s", "0123"),
    )
    run = run_folder.open_run("a", root_uri, facts)
    card = run_folder.read_card(run.location)
    assert {name: getattr(card, name) for name in vars(facts)} == vars(facts)
    assert (card.name, card.run_key) == ("a", run.key) and card.created_ms > 10**12
    run_folder.open_run("a", root_uri, Facts(preset="cifar10"))
    assert run_folder.read_card(run.location) == card


def test_a_run_that_many_open_at_once_has_one_key(root_uri: str) -> None:
    """Two trials of one configuration open their run before one of them has its lock."""
    for i in range(20):
        start = threading.Barrier(4)

        def open_run(name: str = f"run-{i}", start: threading.Barrier = start) -> str:
            start.wait()
            return run_folder.open_run(name, root_uri).key

        with ThreadPoolExecutor(start.parties) as pool:
            keys = {future.result() for future in [pool.submit(open_run) for _ in range(start.parties)]}
        assert keys == {run_folder.existing_run(f"{root_uri}/run-{i}").key}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "data", "a/b", "../a", "/a", "a\\b", " ", " a", "a\n", "a\0b", "a\tb", "\ud800"]
)
def test_an_invalid_run_name_is_a_user_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^run\.name .* cannot be a folder's name") as caught:
        run_folder.open_run(name, str(tmp_path / "runs"))
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["digits", "digits-20250101-120000", "größe", "two words", "a.b", "50%", "a#1?"]
)
def test_a_valid_run_name_is_accepted(name: str, root_uri: str) -> None:
    key = run_folder.open_run(name, root_uri).key
    assert run_folder.open_run(name, root_uri).key == key
    assert storage.resolve(root_uri).folders() == [name]


def test_a_config_gets_an_absolute_storage_and_its_name_is_checked(tmp_path: Path) -> None:
    config = run_folder.with_storage(Config())
    assert (config.run.name, config.run.storage) == (None, str(tmp_path / "runs"))
    assert run_folder.with_storage(config) == config
    for name, message in (
        ("a/b", "cannot be a folder's name"),
        ("n" * 300, r"^run\.name has 300 bytes"),
        ("ö" * 150, r"^run\.name has 300 bytes"),
    ):
        with pytest.raises(UserError, match=message):
            run_folder.with_storage(override(Config(), {"run.name": name}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", [b"", b"\xff", b"3", b"{}", b'{"run_key": null}'])
def test_a_damaged_run_json_is_a_user_error_and_left_unchanged(text: bytes, tmp_path: Path) -> None:
    card = tmp_path / "a" / "run.json"
    card.parent.mkdir()
    card.write_bytes(text)
    with pytest.raises(UserError, match=r"a/run\.json is damaged") as caught:
        run_folder.open_run("a", str(tmp_path))
    assert "\n" not in str(caught.value)
    assert card.read_bytes() == text


STATUS = Status("FINISHED", 64, 32, 1.5, hardware="2 cores", ended_ms=10**12)


def test_the_status_is_read_back(root_uri: str) -> None:
    run = storage.resolve(root_uri)
    assert run_folder.read_status(run) is None
    run_folder.write_status(run, STATUS)
    assert run_folder.read_status(run) == STATUS


@pytest.mark.parametrize(
    "change",
    [{"status": "DONE"}, {"minutes": "1"}, {"images_lost": -1}, {"more": 1}],
    ids=str,
)
def test_the_status_is_typed(root_uri: str, change: dict[str, Any]) -> None:
    run = storage.resolve(root_uri)
    run.child(run_folder.STATUS).write(
        json.dumps(json.loads(run_folder.status_json(STATUS)) | change).encode()
    )
    with pytest.raises(UserError, match=rf"status\.json is damaged: .*{next(iter(change))}"):
        run_folder.read_status(run)


@pytest.mark.slow
def test_a_file_that_is_replaced_all_the_time_is_never_cut_off(s3_bucket: str) -> None:
    """Ten thousand reads of a file that a writer replaces by a longer and a shorter one."""
    run = storage.resolve(s3_bucket)
    texts = [run_folder.status_json(replace(STATUS, hardware="cores " * 10**i)) for i in (0, 3)]
    run.child(run_folder.STATUS).write(texts[0])
    is_done = threading.Event()

    def write() -> int:
        for i in itertools.count():
            run.child(run_folder.STATUS).write(texts[i % 2])
            if is_done.is_set():
                return i
        raise AssertionError("counts without end")

    def read(_: int) -> bytes:
        return run.child(run_folder.STATUS).read()

    with ThreadPoolExecutor(5) as pool:
        writer = pool.submit(write)
        found = set(pool.map(read, range(10_000)))
        is_done.set()
    assert found == set(texts) and writer.result() > 100


class ReadOnly(FrontEnd):
    """S3 whose rights allow reading only."""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if method in ("GET", "HEAD"):
            return None
        error = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        return 403, error, {"Content-Type": "application/xml"}


def writing_to(uri: str) -> Config:
    return run_folder.with_storage(override(Config(), {"run.storage": uri}))


def test_the_check_of_storage_leaves_nothing(root_uri: str) -> None:
    root = storage.resolve(root_uri)
    run_folder.check_writable(writing_to(root_uri))
    assert root.files() == [] and not (root.is_local and root.exists())
    root.child("run/run.json").write(b"")
    run_folder.check_writable(writing_to(root_uri))
    assert root.files() == [] and root.folders() == ["run"]


def test_a_bucket_that_refuses_writes_is_found_before_anything_is_prepared(
    s3_server: servers.S3Server,
    s3_bucket: str,
    user_error: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ReadOnly(s3_server.endpoint) as front_end:
        monkeypatch.setenv("AWS_ENDPOINT_URL", front_end.uri)
        for job in ("train", "search"):
            refused = user_error(job, "digits", "--run.storage", f"{s3_bucket}/runs")
            assert f"run.storage {s3_bucket}/runs" in refused
    assert capsys.readouterr().out == ""
    assert not ray.is_initialized()


def test_storage_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to run\.storage .*/file"):
        run_folder.open_run("a", str(tmp_path / "file"))
    for uri in (tmp_path / "file", tmp_path / "file/runs"):
        with pytest.raises(UserError, match=rf"run\.storage {uri}"):
            run_folder.check_writable(writing_to(str(uri)))


def test_complete_checkpoints_are_listed_oldest_first(root_uri: str) -> None:
    run = run_folder.open_run("a", root_uri).location
    for images_seen in (20_000, 3_000, 100_000):
        write_checkpoint(run, images_seen)
    write_checkpoint(run, 200_000, whole=False)
    best = checkpoint_name(3_000).replace("checkpoint", "best")
    run.child(f"{best}/checksums.json").write(b"{}")
    copies = f"{best}-good", "best-of-all", "checkpoint-000000100000-good"
    for copy in copies:  # a user's
        run.child(f"{copy}/config.json").write(b"{}")
    run.child("samples/latest.png").write(b"")
    stored = [folder.uri.rpartition("/")[2] for folder in run_folder.checkpoints(run)]
    assert stored == [checkpoint_name(n) for n in (3_000, 20_000, 100_000)]
    assert run_folder.checkpoints(storage.resolve(root_uri).child("never")) == []
    writer = generations.Writer(run, "driver", "writer")
    writer.claim()
    assert writer.begin(writer.read(), 100_000, 0)
    writer.commit(num_rows=0, oldest=100_000)
    assert run_folder.checkpoints(run) == [run.child(checkpoint_name(100_000))]
    checkpoint_manager.retire(run, generation=1)
    kept = [best, checkpoint_name(100_000), *copies, "samples"]
    assert run.folders() == sorted([*kept, checkpoint_name(200_000)])
    checkpoint_manager.clean_up(run, generation=1)
    assert checkpoint_name(200_000) in run.folders()  # its own writer may be at it
    checkpoint_manager.clean_up(run, generation=2)
    assert run.folders() == sorted(kept)


def test_a_run_means_its_newest_complete_checkpoint_and_a_checkpoint_itself(root_uri: str) -> None:
    run = run_folder.open_run("a", root_uri).location
    older = write_checkpoint(run, 3_000)
    newer = write_checkpoint(run, 20_000)
    write_checkpoint(run, 100_000, whole=False)
    expected = {run.uri: newer, older.uri: older, older.uri + "/": older}
    for uri, location in expected.items():
        with names.local_checkpoint(uri) as folder:
            assert (folder / "net.safetensors").read_bytes() == location.child("net.safetensors").read()
            assert sorted(path.name for path in folder.iterdir()) == ["checksums.json", "net.safetensors"]
            # One on disk is used in place; a downloaded one is removed afterwards.
            assert location.is_local == (folder == Path(location.path))
        assert folder.exists() == location.is_local


def test_a_file_of_a_checkpoint_in_a_bucket_may_be_larger_than_what_is_read_whole(s3_bucket: str) -> None:
    folder = write_checkpoint(run_folder.open_run("a", s3_bucket).location, 3_000)
    folder.child("optimizer.safetensors").write(bytes(MAX_BYTES + 1))
    with names.local_checkpoint(folder.uri) as local:
        assert (local / "optimizer.safetensors").stat().st_size == MAX_BYTES + 1


def test_reading_a_checkpoint_waits_for_the_end_of_an_outage(
    s3_server: servers.S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(s3_server.endpoint) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.endpoint)
        run = run_folder.open_run("a", s3_bucket).location
        stored = write_checkpoint(run, 3_000)
        faulty.switch("down")
        with pytest.raises(StorageError), names.as_folder(stored):
            pass
        threading.Timer(1.0, faulty.switch, ["pass"]).start()
        with names.as_folder(stored, timeout_s=300) as folder:
            assert (folder / "net.safetensors").read_bytes() == b"net after 3000"


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("runs/digits/", "digits"),
        ("runs/digits/checkpoint-000000000064-g1", "digits"),
        ("models:/digits@champion", "digits@champion"),
        ("models:/digits/3", "digits-3"),
    ],
)
def test_the_name_of_a_run_or_model(uri: str, name: str) -> None:
    assert names.name_of(uri) == name


def test_a_relative_path_starts_from_the_working_folder(tmp_path: Path) -> None:
    location = write_checkpoint(run_folder.open_run("a", str(tmp_path)).location, 1)
    with names.local_checkpoint("a") as folder:  # every test runs in its tmp_path
        assert folder == Path(location.path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("b", "/b does not exist"),
        ("a", "/a holds no checkpoint"),
        ("a/run.json", r"/run\.json .*checkpoint"),
    ],
)
def test_what_is_not_a_checkpoint_is_a_user_error(root_uri: str, uri: str, message: str) -> None:
    write_checkpoint(run_folder.open_run("a", root_uri).location, 5, whole=False)
    with pytest.raises(UserError, match=message), names.local_checkpoint(f"{root_uri}/{uri}"):
        pass
