"""Near-duplicates: copies are found, other images are not, and dropping them leaves no leak."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm.data import duplicates, prepare
from ddpm.data.duplicates import Duplicate
from ddpm.data.shards import read_row_group
from ddpm.data.sources.sources import Digits, Loaded, Source
from ddpm.runs.storage import resolve
from ddpm.utils.errors import UserError

DROP: dict[str, Any] = {"drop_duplicates": True, "rows_per_row_group": 1}


@dataclass(frozen=True)
class Given(Loaded):
    """The given images, labelled by their positions."""

    images: dict[str, Any]
    _images = property(lambda self: self.images)
    name = "given"
    height = 16
    channels = 3
    encoding = "raw"
    class_names: ClassVar = tuple(map(str, range(50)))

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}


def given(train: list[np.ndarray], test: list[np.ndarray]) -> Given:
    splits = {"train": train, "test": test}
    return Given({split: (np.stack(images), np.arange(len(images))) for split, images in splits.items()})


def noise(count: int, seed: int = 0) -> list[np.ndarray]:
    """Images whose thumbnails are far from each other."""
    return [*np.random.default_rng(seed).integers(0, 248, (count, 16, 16, 3), np.uint8)]


def planted() -> Given:
    """Train image 20 is 3 brightened, 21 is 4 mirrored, 30 too far from 8; test images 2 and 5 and train 40 are 7."""
    train = noise(41)
    test = noise(6, seed=1)
    train[20] = train[3] + 2
    train[21] = train[4][:, ::-1]
    train[30] = train[8] + 3
    train[40] = train[7]
    test[2] = train[7]
    test[5] = train[7] + 1
    return given(train, test)


FOUND = [
    Duplicate(False, 0.0, ("train", 7), ("test", 2), False),
    Duplicate(False, 0.0, ("train", 40), ("test", 2), False),
    Duplicate(True, 0.0, ("train", 21), ("train", 4), True),
    Duplicate(True, 1.0, ("test", 5), ("test", 2), False),
    Duplicate(True, 2.0, ("train", 20), ("train", 3), False),
]


def found_in(source: Source, root: Path) -> list[Duplicate]:
    location = resolve(str(root))
    return duplicates.find(location, prepare.prepare(source, location, rows_per_row_group=8))


@pytest.mark.lowest
def test_planted_copies_are_found_and_no_digit_is(tmp_path: Path) -> None:
    assert found_in(planted(), tmp_path / "planted") == FOUND
    assert found_in(Digits(), tmp_path / "digits") == []


def test_a_train_image_like_a_held_out_one_that_is_left_out_is_a_leak(tmp_path: Path) -> None:
    (image,) = noise(1)
    source = given([*noise(3, seed=1), image + 4], [image, image + 2])  # train 3 looks like test 1, but not 0
    pairs = [(pair.row, pair.like) for pair in found_in(source, tmp_path)]
    assert pairs == [(("train", 3), ("test", 1)), (("test", 1), ("test", 0))]


def test_dropping_keeps_all_others_also_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    location = resolve(f"{tmp_path}/whole")
    source = planted()
    manifest = prepare.prepare(source, location, **DROP)
    assert duplicates.find(location, manifest) == []
    for split, (images, _) in source.images.items():
        kept = [i for i in range(len(images)) if (split, i) not in {pair.row for pair in FOUND}]
        read = [read_row_group(location, manifest, split, i) for i in range(len(kept))]
        assert [int(label[0]) for _, label in read if label is not None] == kept
        assert (np.concatenate([image for image, _ in read]) == images[kept]).all()
    assert "\ntrain 7 looks like test 2 (0.00)\n" in (tmp_path / "whole/duplicates.txt").read_text()
    parts = resolve(f"{tmp_path}/parts")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ddpm.data.prepare.write_manifest", killed)
        prepare.prepare(source, parts, **DROP)
    with pytest.raises(UserError, match="other options"):
        prepare.prepare(source, parts, rows_per_row_group=1)
    prepare.prepare(source, parts, **DROP)
    for path in (path for path in (tmp_path / "whole").rglob("*.*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "parts" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_a_shard_of_copies_is_removed_and_a_split_of_copies_refused(tmp_path: Path) -> None:
    train = noise(16)
    test = noise(2, seed=1)
    prepare.prepare(given([*train, train[3], train[5]], test), resolve(f"{tmp_path}/a"), **DROP)
    assert [path.name for path in (tmp_path / "a/train").iterdir()] == ["00000.parquet"]
    with pytest.raises(UserError, match="each train image"):
        prepare.prepare(given(test[::-1], test), resolve(f"{tmp_path}/b"), **DROP)


def test_too_many_images_are_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MAX_EXAMINED", 19)
    with pytest.raises(UserError, match=r"19 images.* 20"):
        prepare.prepare(given(noise(18), noise(2)), resolve(f"{tmp_path}/a"), **DROP)
    assert not (tmp_path / "a").exists()


def test_a_folder_of_recompressed_and_mirrored_photographs(
    tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    from sklearn.datasets import load_sample_images

    for folder in ("in/train", "in/test"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(12):
        part = Image.fromarray(load_sample_images().images[1][150:250, i * 45 : i * 45 + 100])
        part.save(tmp_path / f"in/{'train' if i else 'test'}/{i}.png")
        part.save(tmp_path / f"in/train/jpeg-{i}.jpg", quality=75)
        ImageOps.mirror(part).resize((75, 75)).save(tmp_path / f"in/train/mirrored-{i}.jpg", quality=90)
    Image.new("L", (300, 100)).save(tmp_path / "in/train/long.png")
    found = "24 of 37 images look like another, 2 like one of another split"
    for options, says, train in (([], "duplicates", 36), (["--drop-duplicates"], "left out  ", 12)):
        out = tmp_path / f"out{train}"
        done = run_job("prepare", "folder", out, "--path", "in", "--size", "32", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        shown = {f"{says}  {found}", f"train       {train} images"}
        assert shown <= {*done.stdout.splitlines()} and f"{out}/duplicates.png, {out}/dupl" in done.stdout
        first, *pairs = (out / "duplicates.txt").read_text().splitlines()
        assert first == found and all(re.search(r"(\d+)\..* looks like .*\b\1\.", pair) for pair in pairs)
