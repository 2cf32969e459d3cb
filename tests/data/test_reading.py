"""The images of a plan: the same wherever the order is split; damage is an error that says where."""

import dataclasses
import io
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import damaged
from support.damaged import NUM_IMAGES, PLAN

from ddpm.data import reading
from ddpm.data.manifest import make_manifest
from ddpm.data.reading import DataSet, PlanReader, scale_of
from ddpm.data.row_group import CorruptData, RowGroup
from ddpm.data.shards import open_row_group, write_shard
from ddpm.runs.storage import resolve


def truncate(root: Path) -> None:
    damaged.rewrite(root, 1, lambda data: data[: len(data) // 2])


def remove(root: Path) -> None:
    damaged.rewrite(root, 2, lambda data: None)


def flip_bytes(root: Path) -> None:
    damaged.damage_row_group(root, 0, 1)


def swap_shard(root: Path) -> None:
    """Swap in another valid shard of the same size."""
    other = root.parent / "other"
    damaged.prepare(str(other), bad_labels={30: 6})
    damaged.rewrite(root, 1, lambda data: (other / "train/00001.parquet").read_bytes())


DAMAGES: list[Any] = [
    (truncate, {}, r"1\.parquet, row group [012]: the shard has \d+ bytes; the manifest says \d+; remove"),
    (remove, {}, r"2\.parquet, row group [01]: the shard is missing; the manifest names it; remove"),
    (flip_bytes, {}, r"0\.parquet, row group 1: it cannot be read: .*; remove"),
    (swap_shard, {}, r"1\.parquet, row group 0: its checksum is not that of the manifest; remove"),
    (None, {"bad_files": {19: b"no image"}}, r"0\.parquet, row group 2, row 3: the image cannot be"),
    (None, {"bad_files": {19: damaged.png(19, side=5)}}, r"0\.parquet, row group 2, row 3: the image is 5x5"),
    (None, {"bad_labels": {50: -1}}, r"2\.parquet, row group 0, row 2: the label is -1"),
]


@pytest.mark.parametrize(("damage", "options", "message"), DAMAGES)
def test_damage_is_an_error_with_its_place(
    tmp_path: Path, damage: Any, options: dict[str, Any], message: str
) -> None:
    encoded = "bad_files" in options
    data_set = damaged.opened(damaged.prepare(str(tmp_path / "set"), encoded=encoded, **options))
    plan = data_set.plan(*PLAN)
    if damage:
        assert sorted(data_set.read(plan, 0, NUM_IMAGES).image[:, 0, 0, 0]) == list(range(NUM_IMAGES))
        damage(tmp_path / "set")
    with pytest.raises(CorruptData, match=rf"set/train/0000{message}") as caught:
        data_set.read(plan, 0, NUM_IMAGES)
    assert len(str(caught.value)) < 500


def test_encoded_images_are_decoded_at_reduced_size(tmp_path: Path) -> None:
    """A JPEG is decoded at a fraction of its size: the result is close to the mean of each block of pixels."""
    side = 48
    smooth = np.linspace(0, 200, 48 * 48 * 3).reshape(48, 48, 3)
    images = [np.roll(smooth, 5 * k, axis=1).astype(np.uint8) for k in range(4)]

    def encoded(image: np.ndarray, kind: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, kind, quality=95)
        return file.getvalue()

    for kind, tolerance in (("PNG", 1), ("JPEG", 12)):
        location = resolve(str(tmp_path / kind))
        files = [encoded(image, kind) for image in images]
        shard = write_shard(location, "train/00000.parquet", files, None, rows_per_row_group=4)
        manifest = make_manifest("", (side, side, 3), "encoded", [], {"train": [shard]}, "")
        for size in (48, 24, 16, 12, 8, 6, 3):
            scale = scale_of(manifest, size)
            assert scale == side // size
            data_set = dataclasses.replace(DataSet(location, manifest, "train"), scale=scale)
            got = data_set.read(data_set.plan(0, 4), 0, 4).image
            order = [int(row) for window in data_set.plan(0, 4).windows(0, 4) for row in window.rows]
            assert got.shape == (4, size, size, 3)
            for image, row in zip(got, order, strict=True):
                mean = images[row].reshape(size, scale, size, scale, 3).mean((1, 3))
                assert np.abs(image - mean).mean() < tolerance
        assert scale_of(manifest, 32) == scale_of(manifest, 96) == 1
        assert scale_of(dataclasses.replace(manifest, encoding="raw"), 24) == 1


def test_parts_add_up_to_the_whole(tmp_path: Path) -> None:
    """For any size of the parts, also across windows and epochs."""
    data_set = damaged.opened(damaged.prepare(str(tmp_path), encoded=True))
    plan = data_set.plan(*damaged.PLAN)
    whole = data_set.read(plan, 7, 130)
    for max_images in (1, 5, 32, 1000):
        parts = list(data_set.parts(plan, 7, 130, max_images))
        assert all(len(part.label) <= max_images for part in parts)
        assert np.array_equal(np.concatenate([part.image for part in parts]), whole.image)
        assert np.array_equal(np.concatenate([part.label for part in parts]), whole.label)


def test_a_reader_opens_a_row_group_once_and_keeps_those_of_one_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set = damaged.opened(damaged.prepare(str(tmp_path)))
    plan = data_set.plan(*damaged.PLAN)
    whole = data_set.read(plan, 0, 2 * NUM_IMAGES)
    opened: list[weakref.ref[RowGroup]] = []

    def counted(*args: Any) -> RowGroup:
        row_group = open_row_group(*args)
        opened.append(weakref.ref(row_group))
        return row_group

    monkeypatch.setattr(reading, "open_row_group", counted)
    reader = PlanReader(data_set, plan)
    for start in range(0, 2 * NUM_IMAGES, 5):
        images = reader.read(start, start + 5)
        assert np.array_equal(images.image, whole.image[start : start + 5])
        assert np.array_equal(images.label, whole.label[start : start + 5])
        assert sum(row_group() is not None for row_group in opened) <= 4
    assert len(opened) == 2 * 8  # of two epochs
    again = reader.read(0, 5)  # back to another window
    assert np.array_equal(again.image, whole.image[:5])
