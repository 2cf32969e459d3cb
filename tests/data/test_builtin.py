"""A run without --data.shards: its source, or a folder of images, is prepared once, beside the runs."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm import presets
from ddpm.config import Config, override
from ddpm.data import builtin, ray_dataset
from ddpm.data.manifest import MANIFEST, read_manifest
from ddpm.storage import locations
from ddpm.utils.errors import UserError


def write_images(top: Path, count: int, seed: int = 0) -> None:
    """Write `count` images of different sizes and formats to each of two subfolders."""
    numbers = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        (top / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = numbers.integers(0, 256, (30 + i, 45, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(top / name / f"{seed}-{i}.{'jpg' if i % 2 else 'png'}")


def config_of(tmp_path: Path, images: str | Path | None, **changes: Any) -> Config:
    given = {"data.images": None if images is None else str(images), "run.storage": str(tmp_path / "runs")}
    return override(presets.DIGITS, given | changes)


def test_an_image_folder_is_prepared_at_the_size_of_the_net(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "my pets", 20)
    (tmp_path / "my pets/cat/notes.txt").touch()
    config = config_of(tmp_path, tmp_path / "my pets", **{"model.image_size": 12, "model.channels": 3})
    found = builtin.with_shards(config)
    assert found == replace(
        config, data=replace(config.data, shards=found.data.shards, images=None, source=None)
    )
    assert re.fullmatch(rf"{tmp_path}/runs/data/my-pets-[0-9a-f]{{8}}", str(found.data.shards))
    manifest = read_manifest(locations.resolve(str(found.data.shards)))
    assert (manifest.height, manifest.width, manifest.channels) == (12, 12, 3)
    assert manifest.class_names == ("cat", "dog")
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {"train": 38, "test": 2}
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"images      {tmp_path}/my pets, as 12x12 colour (--model.image-size, --model.channels)",
        "skipped     1 .txt (cat/notes.txt)",
    ]
    assert ray_dataset.open_configured(found).rows.num_rows == 38


def test_the_same_images_are_prepared_once_and_changed_ones_again(tmp_path: Path) -> None:
    write_images(tmp_path / "pets", 4)
    config = config_of(tmp_path, tmp_path / "pets")
    first = str(builtin.with_shards(config).data.shards)
    before = {path: path.stat().st_mtime_ns for path in Path(first).rglob("*")}
    assert builtin.with_shards(config).data.shards == first
    shutil.copytree(tmp_path / "pets", tmp_path / "moved/pets")
    assert builtin.with_shards(config_of(tmp_path, tmp_path / "moved/pets")).data.shards == first
    assert {path: path.stat().st_mtime_ns for path in Path(first).rglob("*")} == before
    larger = override(config, {"model.image_size": 16})
    write_images(tmp_path / "pets", 1, seed=1)
    assert len({first, builtin.with_shards(config).data.shards, builtin.with_shards(larger).data.shards}) == 3


def test_preparing_resumes_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "pets", 4)
    config = config_of(tmp_path, tmp_path / "pets")
    whole = builtin.with_shards(config_of(tmp_path / "other", tmp_path / "pets"))

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(builtin.prepare, "write_manifest", interrupt)
        builtin.with_shards(config)
    (unfinished,) = (tmp_path / "runs/data").iterdir()
    written = {path: path.stat().st_mtime_ns for path in unfinished.rglob("*.parquet")}
    assert written and not (unfinished / MANIFEST).exists()
    again = builtin.with_shards(config)
    assert Path(str(again.data.shards)) == unfinished
    assert {path: path.stat().st_mtime_ns for path in unfinished.rglob("*.parquet")} == written
    assert (unfinished / MANIFEST).read_bytes() == Path(str(whole.data.shards), MANIFEST).read_bytes()


def test_user_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "pets", 2)
    (tmp_path / "pets/cat/0-0.png").write_bytes(b"no picture")
    for images, changes, message in (
        ("nowhere", {}, "--data.images nowhere is not a folder on this machine; name a folder of images"),
        ("s3://b/c", {}, "--data.images s3://b/c is not a folder on this machine; name a folder of images"),
        (
            tmp_path / "pets",
            {"data.shards": "x"},
            "--data.images and --data.shards are two data sets; give one",
        ),
        (tmp_path / "pets", {"model.channels": 2}, "or 3 (colour), but model.channels is 2"),
        (tmp_path / "empty", {}, f"{tmp_path}/empty holds no images"),
        (tmp_path / "pets", {}, f"cannot read the image {tmp_path}/pets/cat/0-0.png: "),
        (None, {"data.source": None}, "data.source is None"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            builtin.with_shards(config_of(tmp_path, images, **changes))
        assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_training_on_an_image_folder_and_resuming(run_job: Callable[..., Any], tmp_path: Path) -> None:
    """The same command resumes; after the images have changed it is an error."""
    write_images(tmp_path / "pets", 20)
    words = (
        "digits --data.images pets --model.channels 3 --model.num-classes 2 --name a --batch-size 64".split()
    )
    words += "--model.base-width 8 --model.norm-groups 4 --schedule.num-timesteps 50".split()
    for total in (128, 256):
        done = run_job("train", *words, "--total-images", total, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "images      pets, as 8x8 colour" in done.stdout
        assert f"trained     {total} images" in done.stdout
    assert (tmp_path / "runs/a/checkpoint-000000000128").exists()
    evaluated = run_job("evaluate", "runs/a", "--num-images", "20", cwd=tmp_path)
    assert evaluated.returncode == 2 and "has 2 held-out images" in evaluated.stderr
    write_images(tmp_path / "pets", 1, seed=1)
    done = run_job("train", *words, "--total-images", 512, cwd=tmp_path)
    assert done.returncode == 2
    assert "was trained on other data" in done.stderr and done.stderr.count("\n") == 1
