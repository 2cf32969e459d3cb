"""The images of a plan, and substitutes for unreadable ones: the same wherever the order is split."""

import dataclasses
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import damaged
from support.damaged import NUM_IMAGES, PLAN, ROWS

from ddpm.data import reading
from ddpm.data.corrupt import CorruptData
from ddpm.data.manifest import make_manifest
from ddpm.data.plan import Plan
from ddpm.data.reading import DataSet, Images, scale_of
from ddpm.data.shards import write_shard
from ddpm.storage.locations import resolve

STOP = 2 * NUM_IMAGES + 10
"""Two epochs and ten images."""


def number(row_group: int, row: int) -> int:
    return row_group * ROWS + row


def expected(plan: Plan, unreadable: set[int]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """A direct implementation of the rule: the numbers at [0, STOP), and (position, unreadable, substitute)."""
    shown, replaced = [], []
    for window in plan.windows(0, STOP):
        numbers = [
            number(g, r) for g, r in zip(window.row_groups.tolist(), window.rows.tolist(), strict=True)
        ]
        for i, n in enumerate(numbers):
            cycle = numbers[i:] + numbers[:i]
            shown.append(next(m for m in cycle if m not in unreadable))
            if n in unreadable:
                replaced.append((window.start + i, n, shown[-1]))
    return shown[:STOP], [r for r in replaced if r[0] < STOP]


def check(images: Images, start: int, shown: list[int], replaced: list[tuple[int, int, int]]) -> None:
    stop = start + len(images.image)
    assert (images.image == np.array(shown[start:stop], np.uint8)[:, None, None, None]).all()
    assert images.label.tolist() == [n % 7 for n in shown[start:stop]]
    found = [
        (
            s.position,
            number(int(s.shard[6:11]) * 3 + s.row_group, s.row),
            number(int(s.stand_in_shard[6:11]) * 3 + s.stand_in_row_group, s.stand_in_row),
        )
        for s in images.substitutions
    ]
    assert found == [r for r in replaced if start <= r[0] < stop]


def truncate(root: Path) -> set[int]:
    damaged.rewrite(root, 1, lambda data: data[: len(data) // 2])
    return set(range(24, 48))


def remove(root: Path) -> set[int]:
    damaged.rewrite(root, 2, lambda data: None)
    return set(range(48, 60))


def flip_bytes(root: Path) -> set[int]:
    damaged.damage_row_group(root, 0, 1)
    damaged.damage_row_group(root, 1, 2)
    return set(range(8, 16)) | set(range(40, 48))


def swap_shard(root: Path) -> set[int]:
    """Swap in another valid shard: the checksums of all its row groups but the last differ."""
    other = root.parent / "other"
    damaged.prepare(str(other), encoded=True, bad_files={i: damaged.png(99) for i in (24, 33)})
    damaged.rewrite(root, 1, lambda data: (other / "train/00001.parquet").read_bytes())
    return set(range(24, 40))


BAD_FILES = {3: b"", 17: b"no image", 18: damaged.png(18)[:40], 19: damaged.png(19, side=5), 59: b"GIF89a"}
DAMAGES: list[Any] = [
    (truncate, {}, None),
    (remove, {}, "the shard is missing; the manifest names it"),
    (flip_bytes, {}, None),
    (swap_shard, {"encoded": True}, "its checksum is not that of the manifest"),
    (flip_bytes, {"encoded": True}, None),
    (lambda _: set(BAD_FILES), {"encoded": True, "bad_files": BAD_FILES}, None),
    (lambda _: {5, 50}, {"bad_labels": {5: 7, 50: -1}}, None),
]


@pytest.mark.parametrize(("damage", "options", "reason"), DAMAGES)
def test_a_substitute_is_the_next_readable_image_of_the_window(
    tmp_path: Path, damage: Any, options: dict[str, Any], reason: str | None
) -> None:
    location = damaged.prepare(str(tmp_path / "set"), **options)
    data_set = damaged.opened(location)
    plan = data_set.plan(*PLAN)
    shown, _ = expected(plan, set())
    if not options.get("bad_files") and not options.get("bad_labels"):
        check(data_set.read(plan, 0, STOP, "substitute"), 0, shown, [])
    unreadable = damage(tmp_path / "set")
    shown, replaced = expected(plan, unreadable)
    assert {r[1] for r in replaced} == unreadable
    whole = data_set.read(plan, 0, STOP, "substitute")
    check(whole, 0, shown, replaced)
    for cut in (1, 7, 16, 50):  # wherever the order is split, by chunks or by resuming
        parts = [data_set.read(plan, a, min(a + cut, STOP), "substitute") for a in range(0, STOP, cut)]
        assert (np.concatenate([part.image for part in parts]) == whole.image).all()
        assert (np.concatenate([part.label for part in parts]) == whole.label).all()
        assert tuple(s for part in parts for s in part.substitutions) == whole.substitutions
    if reason:
        assert {s.reason for s in whole.substitutions} == {reason}
    assert all(str(tmp_path) not in s.reason and s.reason for s in whole.substitutions)
    with pytest.raises(
        CorruptData, match=r"set/train/0000\d\.parquet, row group \d(, row \d| \(rows 0-[37]\)): "
    ):
        data_set.read(plan, 0, STOP)


def test_a_window_without_a_readable_image_is_an_error(tmp_path: Path) -> None:
    location = damaged.prepare(str(tmp_path / "set"))
    data_set = damaged.opened(location)
    plan = data_set.plan(*PLAN)
    window = next(plan.windows(0, 1))
    for group in set(window.row_groups.tolist()):
        damaged.damage_row_group(tmp_path / "set", group // 3, group % 3)
    with pytest.raises(
        CorruptData,
        match=r"no image of the (32|28) in its window can replace .*\.parquet, row group \d \(rows 0-7\)",
    ):
        data_set.read(plan, 0, 8, "substitute")
    assert len(data_set.read(plan, 32, 48, "substitute").image) == 16


def test_one_readable_image_can_substitute_all_others(tmp_path: Path) -> None:
    files = {i: b"" for i in range(NUM_IMAGES) if i != 30}
    data_set = damaged.opened(damaged.prepare(str(tmp_path / "set"), encoded=True, bad_files=files))
    plan = data_set.plan(0, NUM_IMAGES)
    images = data_set.read(plan, 0, NUM_IMAGES, "substitute")
    assert (images.image == 30).all() and len(images.substitutions) == NUM_IMAGES - 1


def test_a_bad_row_group_is_read_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_set = damaged.opened(damaged.prepare(str(tmp_path / "set")))
    plan = data_set.plan(0, NUM_IMAGES)
    truncate(tmp_path / "set")
    opened: Counter[int] = Counter()

    def count(*args: Any) -> Any:
        opened[args[-1]] += 1
        return real(*args)

    real = reading.open_row_group
    monkeypatch.setattr(reading, "open_row_group", count)
    data_set.read(plan, 0, NUM_IMAGES, "substitute")
    assert opened == dict.fromkeys(range(8), 1)
    opened.clear()
    data_set.read(plan, 0, 30, "substitute")  # substitutes may come from later rows
    assert max(opened[i] for i in (3, 4, 5)) == 1 and max(opened.values()) <= 2


def test_encoded_images_are_decoded_at_reduced_size(tmp_path: Path) -> None:
    """A JPEG is decoded at a fraction of its size: the result is close to the mean of each block of pixels."""
    side, smooth = 48, np.linspace(0, 200, 48 * 48 * 3).reshape(48, 48, 3)
    images = [np.roll(smooth, 5 * k, axis=1).astype(np.uint8) for k in range(4)]

    def encoded(image: np.ndarray, kind: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, kind, quality=95)
        return file.getvalue()

    for kind, tolerance in (("PNG", 1), ("JPEG", 12)):
        location = resolve(str(tmp_path / kind))
        files = [encoded(image, kind) for image in images]
        shard = write_shard(location, "train/00000.parquet", files, None, rows_per_row_group=4)
        manifest = make_manifest("", side, side, 3, "encoded", [], {"train": [shard]}, "")
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
    """For any size of the parts; each part reads its row groups only once."""
    data_set = damaged.opened(damaged.prepare(str(tmp_path), encoded=True, bad_files={5: b"", 41: b""}))
    plan = data_set.plan(*damaged.PLAN)
    whole = data_set.read(plan, 7, 130, "substitute")
    for max_images in (1, 5, 32, 1000):
        parts = list(data_set.parts(plan, 7, 130, max_images, "substitute"))
        assert all(len(part.label) <= max_images for part in parts)
        assert np.array_equal(np.concatenate([part.image for part in parts]), whole.image)
        assert np.array_equal(np.concatenate([part.label for part in parts]), whole.label)
        assert tuple(s for part in parts for s in part.substitutions) == whole.substitutions
