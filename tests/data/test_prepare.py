"""Preparing a data set: its content, resuming after a kill, and that nothing is overwritten."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.config import override
from ddpm.data.builtin import with_shards
from ddpm.data.image_folder import Folder
from ddpm.data.manifest import FORMAT, MANIFEST, Manifest, read_manifest
from ddpm.data.prepare import prepare, write_preview
from ddpm.data.shards import is_intact, read_row_group
from ddpm.data.sources import Digits
from ddpm.presets import DIGITS
from ddpm.storage import locations
from ddpm.storage.locations import Location, resolve
from ddpm.utils.errors import UserError
from ddpm.utils.images import png_bytes

SMALL = {"rows_per_shard": 600, "rows_per_row_group": 100}
"""Digits in three shards of "train" and one of "test"."""


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
    return locations.resolve(str(root))


def make(source: Digits, location: Location, **options: Any) -> Manifest:
    return prepare(source, location, **options)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def all_images(location: Location, manifest: Manifest, split: str) -> list[tuple[int, bytes]]:
    found = []
    for index in range(sum(len(shard.row_groups) for shard in manifest.splits[split].shards)):
        pixels, labels = read_row_group(location, manifest, split, index)
        assert labels is not None
        found += [(int(label), image.tobytes()) for label, image in zip(labels, pixels, strict=True)]
    return found


def test_a_data_set_has_the_images_of_the_source_in_order(tmp_path: Path) -> None:
    source, seen = Digits(), []
    manifest = make(
        source, at(tmp_path / "d"), on_progress=lambda done, total: seen.append((done, total)), **SMALL
    )
    assert manifest == read_manifest(resolve(str(tmp_path / "d")))
    assert [shard.num_rows for shard in manifest.splits["train"].shards] == [600, 600, 300]
    assert manifest.splits["test"].shards[0].row_groups == (100, 100, 97)
    assert (manifest.source, manifest.height, manifest.width, manifest.channels) == ("digits", 8, 8, 1)
    for split, n in source.splits.items():
        images, labels = source.read(split, 0, n)
        expected = [(int(label), image.tobytes()) for label, image in zip(labels, images, strict=True)]
        assert all_images(at(tmp_path / "d"), manifest, split) == expected
    assert sorted(seen) == seen and seen[-1] == (1797, 1797)
    assert set(files_of(tmp_path / "d")) == {MANIFEST, "test/00000.parquet"} | {
        f"train/0000{i}.parquet" for i in range(3)
    }


def test_held_out_images_are_not_in_train(tmp_path: Path) -> None:
    manifest = make(Digits(), at(tmp_path), **SMALL)
    train, test = (all_images(at(tmp_path), manifest, split) for split in ("train", "test"))
    assert len(test) == 297 and len(train) == 1500
    assert not set(test) & set(train)


def test_resuming_after_a_kill_gives_the_same_bytes(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(Digits(), at(whole), **SMALL)
    with pytest.raises(Killed):
        make(DigitsKilledMidway(), at(parts), **SMALL)
    with pytest.raises(UserError, match="manifest"):
        read_manifest(resolve(str(parts)))
    made = {
        name: (parts / name).stat().st_mtime_ns for name in ("train/00000.parquet", "train/00001.parquet")
    }
    make(Digits(), at(parts), **SMALL)
    assert files_of(parts) == files_of(whole)
    assert {name: (parts / name).stat().st_mtime_ns for name in made} == made, (
        "finished shards were made again"
    )


@pytest.mark.parametrize("damage", ["truncated", "altered", "deleted"])
def test_a_shard_damaged_meanwhile_is_written_again(tmp_path: Path, damage: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(Digits(), at(whole), **SMALL)
    with pytest.raises(Killed):
        make(DigitsKilledMidway(), at(parts), **SMALL)
    shard = parts / "train/00000.parquet"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    {
        "truncated": lambda: shard.write_bytes(data[:100]),
        "altered": lambda: shard.write_bytes(data),
        "deleted": shard.unlink,
    }[damage]()
    make(Digits(), at(parts), **SMALL)
    assert files_of(parts) == files_of(whole)


def test_repeating_does_nothing_and_other_options_are_rejected(tmp_path: Path) -> None:
    first = make(Digits(), at(tmp_path), **SMALL)
    before = files_of(tmp_path)
    seen: list[int] = []
    assert make(Digits(), at(tmp_path), on_progress=lambda done, _: seen.append(done), **SMALL) == first
    assert seen == []
    for source, rows in ((Digits(seed=1), SMALL), (Digits(), SMALL | {"rows_per_shard": 700})):
        with pytest.raises(UserError, match="other options"):
            make(source, at(tmp_path), **rows)
    assert files_of(tmp_path) == before


def test_an_older_format_is_rejected_and_left_unchanged(tmp_path: Path) -> None:
    make(Digits(), at(tmp_path), **SMALL)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace(FORMAT, "ddpm-shards/1"))
    before = files_of(tmp_path)
    with pytest.raises(
        UserError, match=r"format is 'ddpm-shards/1'; this version reads .*: prepare the data set again"
    ):
        make(Digits(), at(tmp_path), **SMALL)
    assert files_of(tmp_path) == before


def test_builtin_data_is_prepared_again_beside_an_older_format(tmp_path: Path) -> None:
    old = tmp_path / "data" / "digits"
    old.mkdir(parents=True)
    (old / MANIFEST).write_text('{"format": "ddpm-shards/1"}')
    config = override(DIGITS, {"run.storage": str(tmp_path)})
    uri = with_shards(config).data.shards
    assert uri is not None and uri != str(old)
    assert read_manifest(resolve(uri)).splits["train"].num_rows == 1500
    assert with_shards(config).data.shards == uri
    assert files_of(old) == {MANIFEST: b'{"format": "ddpm-shards/1"}'}


def test_shards_of_other_options_are_never_reused(tmp_path: Path) -> None:
    """Raw shards of two seeds have the same size: only their options differ."""
    with pytest.raises(Killed):
        make(DigitsKilledMidway(), at(tmp_path / "d"), **SMALL)
    try:
        manifest = make(Digits(seed=1), at(tmp_path / "d"), **SMALL)
    except UserError:
        assert not (tmp_path / "d" / MANIFEST).exists()
        return
    assert manifest.fingerprint == make(Digits(seed=1), at(tmp_path / "e"), **SMALL).fingerprint


def test_concurrent_calls_give_the_same_data_set_and_no_leftovers(tmp_path: Path) -> None:
    alone = make(Digits(), at(tmp_path / "alone"), **SMALL)
    for i in range(5):
        root, start = tmp_path / f"together-{i}", threading.Barrier(3)

        def make_with_others(root: Path = root, start: threading.Barrier = start) -> Manifest:
            start.wait()
            return make(Digits(), at(root), **SMALL)

        with ThreadPoolExecutor(start.parties) as threads:
            made = [threads.submit(make_with_others) for _ in range(start.parties)]
        assert [one.result() for one in made] == [alone] * start.parties
        assert files_of(root) == files_of(tmp_path / "alone")


def test_shards_are_whole_row_groups(tmp_path: Path) -> None:
    manifest = make(Digits(), at(tmp_path), rows_per_row_group=100)
    train, test = ([s.row_groups for s in manifest.splits[split].shards] for split in ("train", "test"))
    assert {rows for shard in train for rows in shard} == {100} and test == [(100, 100, 97)]


def test_the_preview_shows_64_images(tmp_path: Path) -> None:
    from PIL import Image

    manifest = make(Digits(), at(tmp_path), **SMALL)
    with Image.open(write_preview(resolve(str(tmp_path)), manifest).path) as sheet:
        assert sheet.size == (8 * 50 + 2, 8 * 50 + 2)
        assert len(np.unique(np.asarray(sheet))) > 10


def test_a_storage_error_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="file"):
        make(Digits(), at(tmp_path / "file" / "d"), **SMALL)


def test_a_bucket_holds_the_same_data_set(tmp_path: Path, s3_bucket: str) -> None:
    location = locations.resolve(f"{s3_bucket}/data/digits")
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


@pytest.mark.parametrize("repaired", [True, False])
def test_after_a_bad_image_is_fixed_the_same_command_starts_over(tmp_path: Path, repaired: bool) -> None:
    write_images(tmp_path / "in", 12)
    source = Folder(tmp_path / "in", size=16, channels=1)
    last = tmp_path / "in" / source._files["train"][int(source._rows["train"][1][-1])]
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])  # its header is valid
    place, few, restarts = at(tmp_path / "out"), {"rows_per_shard": 4, "rows_per_row_group": 2}, []
    with pytest.raises(UserError, match=rf"{last.name}.*remove it, then run the same command again"):
        make(Folder(tmp_path / "in", size=16, channels=1), place, **few)
    assert (tmp_path / "out/train/00000.parquet").exists()
    if repaired:
        last.write_bytes(whole)
    else:
        last.unlink()
    again = Folder(tmp_path / "in", size=16, channels=1)
    manifest = make(again, place, on_restart=lambda: restarts.append(1), **few)
    assert restarts == [1]
    assert manifest == make(again, at(tmp_path / "new"), **few)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "new")


def test_another_command_does_not_start_over(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 12)
    (tmp_path / "in/0.png").write_bytes((tmp_path / "in/0.png").read_bytes()[:-100])
    few = {"rows_per_shard": 4, "rows_per_row_group": 2}
    with pytest.raises(UserError, match="cannot read the image"):
        make(Folder(tmp_path / "in", size=16), at(tmp_path / "out"), **few)
    (tmp_path / "in/0.png").unlink()
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match=f"{tmp_path}/out holds an unfinished data set"):
        make(Folder(tmp_path / "in", size=8), at(tmp_path / "out"), **few)
    assert files_of(tmp_path / "out") == before


def test_invalid_images_are_listed_before_anything_is_written(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 12)
    for i in range(3, 8):
        (tmp_path / f"in/{i}.png").write_text("an error page")
    with pytest.raises(UserError) as caught:
        make(Folder(tmp_path / "in", size=16), at(tmp_path / "out"))
    assert str(caught.value) == (
        f"cannot read the image {tmp_path}/in/3.png: it is not a PNG, JPEG, WEBP, BMP, TIFF or GIF file (and 4 more: "
        f"{tmp_path}/in/4.png, {tmp_path}/in/5.png, {tmp_path}/in/6.png, ...); repair them or remove them, then "
        "run the same command again"
    )
    assert not (tmp_path / "out").exists()


def test_a_process_stops_when_another_one_starts_over(tmp_path: Path) -> None:
    def restart(done: int, total: int) -> None:
        (tmp_path / "_prepare/options.txt").write_text("another")

    with pytest.raises(UserError, match="another process has started this data set over; this one stops"):
        make(Digits(), at(tmp_path), on_progress=restart)
    assert not (tmp_path / MANIFEST).exists()


def test_a_too_large_manifest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Digits(), at(tmp_path), **SMALL)
    size = (tmp_path / MANIFEST).stat().st_size
    monkeypatch.setattr("ddpm.data.manifest.MAX_MANIFEST_BYTES", size)
    read_manifest(resolve(str(tmp_path)))
    monkeypatch.setattr("ddpm.data.manifest.MAX_MANIFEST_BYTES", size - 1)
    with pytest.raises(UserError, match=r"manifest\.json is larger than 0 MiB; "):
        read_manifest(resolve(str(tmp_path)))


def test_too_many_row_groups_for_a_manifest_are_rejected_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm.data.prepare.MAX_MANIFEST_BYTES", 17 * 101)
    with pytest.raises(UserError, match="18 row groups are more than a manifest of 0 MiB can list"):
        make(Digits(), at(tmp_path / "d"), **SMALL)
    assert not (tmp_path / "d").exists()
