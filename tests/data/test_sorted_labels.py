"""Labels that run in blocks are told in one line, if a window of the training's order has few classes for it."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm.cli import train
from ddpm.cluster import ray_init
from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.data import sorted_labels
from ddpm.data.manifest import make_manifest, write_manifest
from ddpm.data.reading import DataSet
from ddpm.data.shards import write_shard
from ddpm.runs.storage import resolve
from ddpm.search import setup
from ddpm.search.config import Arguments

CLASSES = 20
SORTED = np.arange(4000) // 200
"""20 classes of 200 images."""
WINDOW = 400


def data_set(uri: str, labels: np.ndarray, rows: int = 100) -> DataSet:
    """A data set of 4x4 images with these labels, in shards of four row groups."""
    location = resolve(uri)
    shards = []
    for i, begin in enumerate(range(0, len(labels), 4 * rows)):
        label = labels[begin : begin + 4 * rows].astype(np.int64)
        images = np.zeros((len(label), 4, 4, 1), np.uint8)
        shards.append(write_shard(location, f"train/{i:05d}.parquet", images, label, rows_per_row_group=rows))
    names = [str(i) for i in range(CLASSES)]
    manifest = make_manifest("test", (4, 4, 1), "raw", names, {"train": shards, "test": shards}, "")
    write_manifest(location, manifest)
    return DataSet(location, manifest, "train")


def classes_in_window(data: DataSet) -> float:
    """The mean number of classes in a window of the order, by reading all of it."""
    plan = data.plan(0, WINDOW)
    counts = [
        len(np.unique(data.read(plan, window.start, window.start + len(window.rows)).label))
        for window in plan.windows(0, plan.num_images)
    ]
    return float(np.mean(counts))


BLOCKS = {
    "sorted": SORTED,
    "sorted twice": np.concatenate([SORTED[::2], SORTED[::2]]),
    "blocks in random order": np.random.RandomState(0).permutation(40).repeat(100) % CLASSES,
    "in pairs of classes": np.concatenate(
        [np.random.RandomState(i).permutation(SORTED[i * 400 : (i + 1) * 400]) for i in range(10)]
    ),
}
MIXED = {
    "shuffled": np.random.RandomState(0).permutation(SORTED),
    "one class after the other": np.arange(4000) % CLASSES,
    "one class has nearly all": np.random.RandomState(0).permutation(np.maximum(SORTED, 18)),
    "one class alone": np.zeros(4000),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_told_in_a_line(root_uri: str, name: str) -> None:
    data = data_set(root_uri, BLOCKS[name])
    warning = sorted_labels.warning(data, WINDOW)
    assert warning is not None and "\n" not in warning and "--data.window-rows" in warning
    told, of = (int(number) for number in re.findall(r"(\d+)(?: classes|;)", warning))
    assert abs(told - classes_in_window(data)) <= 2 and of >= 0.8 * CLASSES


@pytest.mark.parametrize("name", MIXED)
def test_images_in_random_order_cause_no_warning(tmp_path: Path, name: str) -> None:
    data = data_set(str(tmp_path), MIXED[name])
    assert sorted_labels.warning(data, WINDOW) is None
    assert sorted_labels.warning(data, 1) is None  # windows of one row group


def test_a_window_that_has_most_classes_causes_none(tmp_path: Path) -> None:
    data = data_set(str(tmp_path / "large"), SORTED)
    assert sorted_labels.warning(data, 4000) is None
    assert sorted_labels.warning(data, 2000) is None
    small = data_set(str(tmp_path / "small"), SORTED, rows=4)  # a window of 400 images has 100 row groups
    assert sorted_labels.warning(small, WINDOW) is None
    assert sorted_labels.warning(data_set(str(tmp_path / "single"), SORTED[::100], rows=1), 8) is None


def test_damaged_shards_are_left_to_the_training(tmp_path: Path) -> None:
    data = data_set(str(tmp_path), SORTED)
    for shard in (tmp_path / "train").iterdir():
        shard.write_bytes(b"no Parquet")
    assert sorted_labels.warning(data, WINDOW) is None


class Connected(Exception):
    """Training would start Ray."""


def test_training_and_searching_tell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data_set(str(tmp_path / "set"), SORTED)

    def connect(*_: object) -> None:
        raise Connected

    monkeypatch.setattr(ray_init, "connect", connect)
    sizes = {"model.image_size": 4, "data.window_rows": WINDOW, "data.shards": str(tmp_path / "set")}
    flags = "--data set --model.image-size 4 --data.window-rows 400"
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", *flags.split()])
    with pytest.raises(Connected):
        train.main()
    assert "warning: the labels of " in capsys.readouterr().err
    setup.prepare(Arguments("digits", override(DIGITS, sizes)))
    assert "warning: the labels of " in capsys.readouterr().err
