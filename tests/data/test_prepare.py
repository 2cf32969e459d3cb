"""Preparing a data set: its content, resuming after a kill, and that nothing is overwritten."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.processes import wait_for

from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.data.manifest import FORMAT, MANIFEST, Manifest, read_manifest
from ddpm.data.prepare import _rows_per_row_group, prepare, write_preview
from ddpm.data.prepare_for_run import prepared
from ddpm.data.shards import is_intact, read_row_group
from ddpm.data.sources.image_folder import Folder
from ddpm.data.sources.sources import Digits
from ddpm.runs import lock, storage
from ddpm.runs.storage import Location, resolve
from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.images import png_bytes

SMALL = {"rows_per_row_group": 100}
"""Digits in three shards of "train" and one of "test"."""
FEW = {"rows_per_row_group": 1}


@pytest.fixture(autouse=True)
def six_row_groups_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm.data.prepare.ROW_GROUPS_PER_SHARD", 6)


class Killed(BaseException):
    """Stops a call between two shards, as a signal would."""


@dataclass(frozen=True)
class DigitsKilledMidway(Digits):
    """The digits; reading beyond the first images of "train" raises Killed."""

    def read(self, split: str, start: int, stop: int) -> Any:
        if split != "train" or start >= 1200:
            raise Killed
        return super().read(split, start, stop)


def at(root: Path) -> Location:
    return storage.resolve(str(root))


def make(source: Digits, location: Location, **options: Any) -> Manifest:
    return prepare(source, location, **options)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def all_images(location: Location, manifest: Manifest, split: str) -> list[tuple[int, bytes]]:
    found = []
    for index in range(sum(len(shard.row_groups) for shard in manifest.splits[split].shards)):
        pixels, labels = read_row_group(location, manifest, split, index)
        classes = [0] * len(pixels) if labels is None else labels.tolist()
        found += [(label, image.tobytes()) for label, image in zip(classes, pixels, strict=True)]
    return found


def test_a_data_set_has_the_images_of_the_source_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Digits()
    manifest = make(source, at(tmp_path / "d"), **SMALL)
    assert capsys.readouterr().out.splitlines()[-1].startswith("preparing 1,797/1,797")
    assert manifest == read_manifest(resolve(str(tmp_path / "d")))
    assert [shard.num_rows for shard in manifest.splits["train"].shards] == [600, 600, 300]
    assert manifest.splits["test"].shards[0].row_groups == (100, 100, 97)
    assert (manifest.source, manifest.height, manifest.width, manifest.channels) == ("digits", 8, 8, 1)
    for split, n in source.splits.items():
        images, labels = source.read(split, 0, n)
        expected = [(int(label), image.tobytes()) for label, image in zip(labels, images, strict=True)]
        assert all_images(at(tmp_path / "d"), manifest, split) == expected
    with Image.open(write_preview(at(tmp_path / "d"), manifest).path) as sheet:
        assert sheet.size == (8 * 50 + 2, 8 * 50 + 2)
        assert len(np.unique(np.asarray(sheet))) > 10
    assert set(files_of(tmp_path / "d")) == {MANIFEST, "preview.png", "test/00000.parquet"} | {
        f"train/0000{i}.parquet" for i in range(3)
    }


@pytest.mark.parametrize("damage", ["none", "truncated", "altered", "deleted"])
def test_resuming_after_a_kill_gives_the_same_bytes(tmp_path: Path, damage: str) -> None:
    """Finished shards are kept; one that was damaged meanwhile is written again."""
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    make(Digits(), at(whole), **SMALL)
    with pytest.raises(Killed):
        make(DigitsKilledMidway(), at(parts), **SMALL)
    with pytest.raises(UserError, match="manifest"):
        read_manifest(resolve(str(parts)))
    shard = parts / "train/00000.parquet"
    other = parts / "train/00001.parquet"
    made = other.stat().st_mtime_ns
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    {
        "none": lambda: None,
        "truncated": lambda: shard.write_bytes(data[:100]),
        "altered": lambda: shard.write_bytes(data),
        "deleted": shard.unlink,
    }[damage]()
    make(Digits(), at(parts), **SMALL)
    assert files_of(parts) == files_of(whole)
    assert other.stat().st_mtime_ns == made


def test_repeating_does_nothing_and_other_options_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make(Digits(), at(tmp_path), **SMALL)
    before = files_of(tmp_path)
    capsys.readouterr()
    assert make(Digits(), at(tmp_path), **SMALL) == first
    assert capsys.readouterr().out == ""
    for source, rows in ((Digits(seed=1), SMALL), (Digits(), {"rows_per_row_group": 50})):
        with pytest.raises(UserError, match="other options"):
            make(source, at(tmp_path), **rows)
    assert files_of(tmp_path) == before
    with pytest.raises(UserError, match=MANIFEST):
        make(Digits(), at(tmp_path / MANIFEST / "d"), **SMALL)  # a storage error


def test_an_older_format_is_rejected_and_left_unchanged(tmp_path: Path) -> None:
    config = override(DIGITS, {"run.storage": str(tmp_path)})
    uri = str(prepared(config).data.shards)
    path = Path(uri, MANIFEST)
    path.write_text(path.read_text().replace(FORMAT, "ddpm-shards/1"))
    before = files_of(tmp_path)
    message = r"format is 'ddpm-shards/1'; this version reads .*: prepare the data set again"
    with pytest.raises(UserError, match=message):
        prepared(config)
    assert files_of(tmp_path) == before


def test_shards_of_other_options_are_never_reused(tmp_path: Path) -> None:
    """Raw shards of two seeds have the same size: only their options differ."""
    with pytest.raises(Killed):
        make(DigitsKilledMidway(), at(tmp_path / "d"), **SMALL)
    with pytest.raises(UserError, match="an unfinished data set"):
        make(Digits(seed=1), at(tmp_path / "d"), **SMALL)
    make(Digits(), at(tmp_path / "d"), **SMALL)
    (tmp_path / "d" / MANIFEST).unlink()
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"d/train/00000\.parquet is there already"):
        make(Digits(seed=1), at(tmp_path / "d"), **SMALL)
    assert files_of(tmp_path) == before  # they may be anyone's


def test_a_bucket_holds_the_same_data_set(tmp_path: Path, s3_bucket: str) -> None:
    location = storage.resolve(f"{s3_bucket}/data/digits")
    with pytest.raises(Killed):
        make(DigitsKilledMidway(), location, **SMALL)
    there = make(Digits(), location, **SMALL)
    assert there == make(Digits(), at(tmp_path), **SMALL)
    assert read_manifest(location) == there
    for split in there.splits.values():
        assert all(is_intact(location, shard) for shard in split.shards)
    assert not location.child("_prepare").exists()


def write_images(folder: Path, count: int) -> None:
    """Write grey 16x16 PNG files."""
    folder.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (count, 16, 16, 1), np.uint8)):
        (folder / f"{i}.png").write_bytes(png_bytes(image))


@dataclass(frozen=True)
class FolderKilledMidway(Folder):
    """A folder; reading "test" raises Killed."""

    def read(self, split: str, start: int, stop: int) -> Any:
        if split == "test":
            raise Killed
        return super().read(split, start, stop)


def test_shards_of_other_options_or_changed_images_are_not_mixed(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 12)
    location = at(tmp_path / "out")
    with pytest.raises(Killed):
        make(FolderKilledMidway(tmp_path / "in", size=16, channels=1), location, **FEW)
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match=f"{tmp_path}/out holds an unfinished data set"):
        make(Folder(tmp_path / "in", size=8, channels=1), location, **FEW)
    images = (tmp_path / "in/0.png").read_bytes(), (tmp_path / "in/1.png").read_bytes()
    (tmp_path / "in/0.png").write_bytes(images[1])
    with pytest.raises(UserError, match=f"{tmp_path}/out holds an unfinished data set"):
        make(Folder(tmp_path / "in", size=16, channels=1), location, **FEW)
    assert files_of(tmp_path / "out") == before
    (tmp_path / "in/0.png").write_bytes(images[0])
    again = Folder(tmp_path / "in", size=16, channels=1)
    assert make(again, location, **FEW) == make(again, at(tmp_path / "new"), **FEW)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "new")


@dataclass(frozen=True)
class FolderThatChanges(Folder):
    """A folder; while "test" is read, an image changes."""

    change: Callable[[Path], object] = Path.touch

    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        return {key: value for key, value in identity.items() if key != "change"}

    def read(self, split: str, start: int, stop: int) -> Any:
        if split == "test":
            self.change(self.path / "0.png")
        return super().read(split, start, stop)


def flip_last_byte(image: Path) -> None:
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)


def remove_all(image: Path) -> None:
    """Those of "test" cannot be read, but the message must not say that they are damaged."""
    for path in image.parent.iterdir():
        path.unlink()


@pytest.mark.parametrize("change", [flip_last_byte, Path.unlink, remove_all])
def test_images_that_change_while_they_are_read_are_refused(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    write_images(tmp_path / "in", 12)
    shutil.copytree(tmp_path / "in", tmp_path / "kept")
    source = FolderThatChanges(tmp_path / "in", size=16, channels=1, change=change)
    assert any("0.png" in source.name_of("train", row) for row in range(8))  # it was read when it changes
    with pytest.raises(UserError, match="changed while they were read"):
        make(source, at(tmp_path / "out"), **FEW)
    assert not files_of(tmp_path / "out")
    shutil.copytree(tmp_path / "kept", tmp_path / "in", dirs_exist_ok=True)
    quiet = FolderThatChanges(tmp_path / "in", size=16, channels=1)  # another time is no change
    assert make(quiet, at(tmp_path / "out"), **FEW) == make(quiet, at(tmp_path / "new"), **FEW)


def break_images(folder: Path, *numbers: int) -> list[str]:
    """Damage images in two ways; returns the lines that list them."""
    for i in numbers:
        file = folder / f"{i}.png"
        file.write_bytes(
            file.read_bytes()[:-100] if i % 2 else b"an error page"
        )  # the header of one is valid
    reasons = ("it is not a PNG, JPEG, WEBP, BMP or TIFF file", "image file is truncated")
    return sorted(f"{folder}/{i}.png: {reasons[i % 2]}" for i in numbers)


def test_all_unreadable_images_are_named_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = Path("in")
    location = at(tmp_path / "out")
    write_images(pictures, 60)
    whole = (pictures / "7.png").read_bytes()
    lines = break_images(pictures, 3, 4, 7, 50)
    with pytest.raises(UserError) as caught:
        make(Folder(pictures, size=16, channels=1), location, **FEW)
    message = str(caught.value)
    assert message.startswith(f"4 of 60 images cannot be read ({tmp_path}/out/unreadable.txt ")
    assert "--skip-unreadable" in message and "--data.skip-unreadable" in message and "5%" in message
    assert all(line in message for line in lines[:3]) and lines[3] not in message
    assert files_of(tmp_path / "out") == {"unreadable.txt": "".join(f"{line}\n" for line in lines).encode()}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unreadable.txt"]
    (pictures / "7.png").write_bytes(whole)
    with pytest.raises(UserError, match=r"--skip-unreadable .*: in/3\.png"):
        make(Folder(pictures, size=16, channels=1), location, **FEW)
    for name in ("3", "4", "50"):
        (pictures / f"{name}.png").write_bytes(whole)
    make(Folder(pictures, size=16, channels=1), location, **FEW)
    assert not (tmp_path / "out/unreadable.txt").exists()


@pytest.mark.parametrize("encoding", ["encoded", "raw"])
def test_up_to_five_percent_of_the_images_are_skipped(tmp_path: Path, encoding: Any) -> None:
    write_images(tmp_path / "in", 60)
    sound = make(Folder(tmp_path / "in", 16, 1, encoding), at(tmp_path / "sound"), **FEW)
    lines = break_images(tmp_path / "in", 3, 4, 50)
    source = Folder(tmp_path / "in", 16, 1, encoding)
    manifest = make(source, at(tmp_path / "out"), skip_unreadable=True, **FEW)
    assert (tmp_path / "out/unreadable.txt").read_text().splitlines() == lines
    for split in ("train", "test"):
        images = all_images(at(tmp_path / "out"), manifest, split)
        before = all_images(at(tmp_path / "sound"), sound, split)
        assert images == [image for image in before if image in images]
    assert sum(split.num_rows for split in manifest.splits.values()) == 57
    assert (
        make(source, at(tmp_path / "out"), **FEW) == manifest
    )  # with and without the flag, it is the same data set
    break_images(tmp_path / "in", 5)
    with pytest.raises(UserError, match=r"4 of 60 images .*--skip-unreadable .*5%"):
        make(Folder(tmp_path / "in", 16, 1, encoding), at(tmp_path / "more"), skip_unreadable=True, **FEW)
    assert [*files_of(tmp_path / "more")] == ["unreadable.txt"]


def test_an_error_about_many_long_names_is_short(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 200) / ("y" * 200)
    deep.mkdir(parents=True)
    for i in range(1000):
        (deep / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        make(Folder(tmp_path / ("x" * 200), size=16), at(tmp_path / "out"))
    assert (
        str(caught.value).startswith("1,000 of 1,000 images cannot be read (")
        and len(str(caught.value)) < 800
    )
    assert "\n" not in str(caught.value)
    assert len((tmp_path / "out/unreadable.txt").read_text().splitlines()) == 1000


def test_a_process_that_lost_the_lock_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspended process that another one has taken over from writes no manifest."""
    monkeypatch.setattr("ddpm.runs.lock.BEAT_S", 0.01)

    def is_taken_over() -> bool:
        (tmp_path / "driver.json").write_text("{}")  # again, since the lock may be rewritten just after
        return not any(thread.name == "ddpm-driver-lock" for thread in threading.enumerate())

    monkeypatch.setattr("ddpm.utils.progress.Display.update", lambda *_: wait_for(is_taken_over))
    with pytest.raises(UserError, match="taken over"):
        make(Digits(), at(tmp_path))
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("pause", range(6))
def test_two_preparations_at_once_give_one_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: int
) -> None:
    """One process stops inside each of its writes in turn, between the folder and the file, until another one has run
    as far as it can: to the end, or to where it waits."""
    monkeypatch.setattr("ddpm.runs.lock.BEAT_S", 0.01)
    monkeypatch.setattr("ddpm.runs.lock.PATIENCE_S", 600.0)  # the holder is alive, however slow
    alone = make(Digits(), at(tmp_path / "alone"), **SMALL)
    is_stuck = threading.Event()
    other = list[threading.Thread]()
    writes = [0]
    temporary = files.temporary
    made = list[Manifest | UserError]()

    def make_again() -> None:
        try:
            made.append(make(Digits(), at(tmp_path / "both"), **SMALL))
        except UserError as error:
            made.append(error)
        is_stuck.set()

    def paused(path: Path) -> Path:
        if threading.current_thread() is threading.main_thread() and path.name != lock.FILE:
            writes[0] += 1
            if writes[0] == pause + 1:
                other.append(threading.Thread(target=make_again))
                other[0].start()
                assert is_stuck.wait(600)
        return temporary(path)

    monkeypatch.setattr(files, "temporary", paused)
    monkeypatch.setattr("ddpm.data.prepare.log.warning", lambda *words: is_stuck.set())  # it waits
    made.append(make(Digits(), at(tmp_path / "both"), **SMALL))
    other[0].join()
    assert made == [alone, alone] and writes[0] == 6  # a note, four shards, the manifest
    assert files_of(tmp_path / "both") == files_of(tmp_path / "alone")


def test_a_too_large_manifest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Digits(), at(tmp_path), **SMALL)
    size = (tmp_path / MANIFEST).stat().st_size
    monkeypatch.setattr("ddpm.data.manifest.MAX_MANIFEST_BYTES", size)
    read_manifest(resolve(str(tmp_path)))
    monkeypatch.setattr("ddpm.data.manifest.MAX_MANIFEST_BYTES", size - 1)
    with pytest.raises(UserError, match=r"manifest\.json is larger than [\d,]+ bytes"):
        read_manifest(resolve(str(tmp_path)))


def test_too_many_row_groups_for_a_manifest_are_rejected_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm.data.prepare.MAX_MANIFEST_BYTES", 17 * 101)
    with pytest.raises(UserError, match="18 row groups"):
        make(Digits(), at(tmp_path / "d"), **SMALL)
    assert not (tmp_path / "d").exists()


def test_a_row_group_is_not_larger_than_what_is_read(tmp_path: Path) -> None:
    """Large images of few bytes: 1,024 of them would have 4 GiB."""
    for i in range(2):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    assert _rows_per_row_group(Folder(tmp_path, size=2048, channels=1)) == 512


@pytest.mark.slow
def test_ray_tasks_give_the_same_data_set(tmp_path: Path) -> None:
    import ray

    here = make(Digits(), at(tmp_path / "here"), **SMALL)
    write_images(tmp_path / "in", 6)
    break_images(tmp_path / "in", 3)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        there = make(Digits(), at(tmp_path / "there"), connect=lambda: None, **SMALL)
        with pytest.raises(UserError, match=r"^1 of 6 images .*3\.png: "):
            make(Folder(tmp_path / "in", size=16), at(tmp_path / "out"), connect=lambda: None, **FEW)
    finally:
        ray.shutdown()
    assert here == there
