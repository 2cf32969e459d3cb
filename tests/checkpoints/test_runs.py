"""A run keeps its key, and its newest complete checkpoint is found, on disk and in a bucket."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.checkpoints import checkpoint, runs
from ddpm.config import Config, override
from ddpm.hub import resolve
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "runs") if request.param == "local" else request.getfixturevalue("s3_bucket") + "/runs"
    )


def write_checkpoint(run: Location, images_seen: int, *, whole: bool = True) -> Location:
    folder = run.child(checkpoint.name_at(images_seen))
    folder.child("net.safetensors").write(f"net after {images_seen}".encode())
    if whole:
        folder.child("checksums.json").write(b"{}")
    return folder


def test_a_run_gets_a_key_once(root: str) -> None:
    first, other = runs.open_run("a", root), runs.open_run("b", root)
    again = runs.open_run("a", root)
    assert (again.key, again.name, again.location.uri) == (first.key, "a", f"{root}/a")
    assert len({first.key, other.key}) == 2
    assert json.loads(first.location.child("run.json").read()) == {"name": "a", "run_key": first.key}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "data", "a/b", "../a", "/a", "a\\b", " ", " a", "a\n", "a\0b", "a\tb", "\ud800"]
)
def test_an_invalid_run_name_is_a_user_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^run\.name .* cannot be a folder's name") as caught:
        runs.open_run(name, str(tmp_path / "runs"))
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["digits", "digits-20250101-120000", "größe", "two words", "a.b", "50%", "a#1?"]
)
def test_a_valid_run_name_is_accepted(name: str, root: str) -> None:
    key = runs.open_run(name, root).key
    assert runs.open_run(name, root).key == key
    assert locations.resolve(root).folders() == [name]


def test_settled_configs_have_a_name_and_an_absolute_storage(tmp_path: Path) -> None:
    settled = runs.settled(Config(), "glyphs")
    assert settled.run.name is not None
    assert settled.run.name.startswith("glyphs-")
    assert settled.run.storage == str(tmp_path / "runs")
    assert runs.settled(settled, "glyphs") == settled
    assert not (tmp_path / "runs").exists()


def test_settling_rejects_a_bad_name_before_anything_starts() -> None:
    with pytest.raises(UserError, match="cannot be a folder's name"):
        runs.settled(override(Config(), {"run.name": "a/b"}), "glyphs")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"3",
        b'"run_key"',
        b"{}",
        b'{"run_key": null}',
        b'{"run_key": ""}',
        b"[" * 9999,
    ],
)
def test_a_damaged_run_json_is_a_user_error_and_left_unchanged(text: bytes, tmp_path: Path) -> None:
    card = tmp_path / "a" / "run.json"
    card.parent.mkdir()
    card.write_bytes(text)
    with pytest.raises(UserError, match=r"a/run\.json is damaged") as caught:
        runs.open_run("a", str(tmp_path))
    assert "\n" not in str(caught.value)
    assert card.read_bytes() == text


def test_storage_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to run\.storage .*/file"):
        runs.open_run("a", str(tmp_path / "file"))


def test_complete_checkpoints_are_listed_oldest_first(root: str) -> None:
    run = runs.open_run("a", root).location
    for images_seen in (20_000, 3_000, 100_000):
        write_checkpoint(run, images_seen)
    write_checkpoint(run, 200_000, whole=False)
    run.child("best-000000003000/checksums.json").write(b"{}")
    run.child("samples/latest.png").write(b"")
    names = [found.uri.rpartition("/")[2] for found in runs.checkpoints(run)]
    assert names == [checkpoint.name_at(n) for n in (3_000, 20_000, 100_000)]


def test_a_run_without_checkpoints_has_none(root: str) -> None:
    assert runs.checkpoints(locations.resolve(root).child("never")) == []


def test_a_run_folder_means_its_newest_complete_checkpoint(root: str) -> None:
    run = runs.open_run("a", root).location
    for images_seen in (3_000, 20_000):
        write_checkpoint(run, images_seen)
    write_checkpoint(run, 100_000, whole=False)
    with resolve.local_checkpoint(run.uri) as folder:
        assert (folder / "net.safetensors").read_text() == "net after 20000"
        assert sorted(path.name for path in folder.iterdir()) == ["checksums.json", "net.safetensors"]


def test_a_checkpoint_folder_means_itself(root: str) -> None:
    run = runs.open_run("a", root).location
    older, _ = write_checkpoint(run, 3_000), write_checkpoint(run, 20_000)
    for uri in (older.uri, older.uri + "/"):
        with resolve.local_checkpoint(uri) as folder:
            assert (folder / "net.safetensors").read_text() == "net after 3000"


def test_a_checkpoint_on_disk_is_used_in_place(tmp_path: Path) -> None:
    lies = write_checkpoint(runs.open_run("a", str(tmp_path)).location, 1)
    with resolve.local_checkpoint("a") as folder:  # a relative path: every test runs in its tmp_path
        assert folder == Path(lies.path)
    assert folder.exists()


def test_a_downloaded_checkpoint_is_deleted_afterwards(s3_bucket: str) -> None:
    write_checkpoint(runs.open_run("a", s3_bucket).location, 1)
    with resolve.local_checkpoint(f"{s3_bucket}/a") as folder:
        assert (folder / "net.safetensors").exists()
    assert not folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card | {"weights_sha256": "0" * 64},
        lambda card: card | {"format": "ddpm-x_0-error/9"},
        lambda card: card | {"x_0_error": card["x_0_error"][1:]},
        lambda card: card | {"x_0_error": [-1.0] * 3},
        lambda card: card | {"x_0_error": [float("nan")] * 3},
        lambda card: card | {"x_0_error": [10**400] * 3},
        lambda card: card | {"x_0_error": "much"},
        lambda card: [],
    ],
)
def test_invalid_measured_errors_are_a_user_error(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    (tmp_path / "checksums.json").write_text(json.dumps({"ema.safetensors": "a" * 64}))
    errors = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    resolve.keep_x_0_error(str(tmp_path), "a" * 64, errors)
    assert torch.equal(runs.read_x_0_error(tmp_path, 3), errors)
    file = tmp_path / runs.X_0_ERROR
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=r"x_0_error\.json .*; jobs/evaluate\.py writes it again"):
        runs.read_x_0_error(tmp_path, 3)


def test_nothing_is_written_to_a_deleted_checkpoint(tmp_path: Path) -> None:
    resolve.keep_x_0_error(str(tmp_path / "gone"), "a" * 64, torch.ones(3))
    assert not (tmp_path / "gone").exists()


def test_a_missing_checkpoint_is_a_user_error(root: str) -> None:
    with pytest.raises(UserError, match="/a does not exist; expected a checkpoint folder"), \
            resolve.local_checkpoint(f"{root}/a"):  # fmt: skip
        pass
    run = runs.open_run("a", root).location
    write_checkpoint(run, 5, whole=False)
    with pytest.raises(UserError, match=r"/a holds no checkpoint"), resolve.local_checkpoint(run.uri):
        pass


def test_a_file_is_not_a_checkpoint(root: str) -> None:
    run = runs.open_run("a", root).location
    with pytest.raises(UserError, match=r"/run\.json .*checkpoint"), \
            resolve.local_checkpoint(f"{run.uri}/run.json"):  # fmt: skip
        pass
