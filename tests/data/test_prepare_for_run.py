"""A run without --data: its source, or a folder of images, is prepared once, beside the runs."""

import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import damaged

from ddpm.config import presets
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data import prepare_for_run, ray_stream
from ddpm.data.manifest import MANIFEST, read_manifest
from ddpm.data.row_group import CorruptData
from ddpm.runs import storage as locations
from ddpm.runs.checkpoint import check_same_run
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


@pytest.mark.parametrize(("images", "storage"), [(".", "../runs"), ("pets", "pets/runs")])
def test_runs_are_not_stored_among_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str, storage: str
) -> None:
    write_images(tmp_path / "work/pets", 20)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    config = override(presets.DIGITS, {"data.images": images, "run.storage": storage})
    with pytest.raises(UserError, match=r"work.* is in (\.|pets)"):
        prepare_for_run.prepared(config)
    assert {path.name for path in tmp_path.iterdir()} == {"work"}
    assert {path.name for path in (tmp_path / "work/pets").iterdir()} == {"cat", "dog"}


def test_an_image_folder_is_prepared_at_the_size_of_the_net(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "my pets", 20)
    (tmp_path / "my pets/cat/notes.txt").touch()
    config = config_of(tmp_path, tmp_path / "my pets", **{"model.image_size": 12, "model.channels": 3})
    found = prepare_for_run.prepared(config)
    assert found == replace(
        config, data=replace(config.data, shards=found.data.shards, images=None, source=None)
    )
    assert re.fullmatch(rf"{tmp_path}/runs/data/my-pets-[0-9a-f]{{8}}", str(found.data.shards))
    manifest = read_manifest(locations.resolve(str(found.data.shards)))
    assert (manifest.height, manifest.width, manifest.channels) == (12, 12, 3)
    assert manifest.class_names == ("cat", "dog")
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {"train": 32, "test": 8}
    images, skipped, labels, few = capsys.readouterr().out.splitlines()[:4]
    assert f"{tmp_path}/my pets, as 12x12 colour" in images and "cat/notes.txt" in skipped
    assert "--model.num-classes 2" in labels and "cat, dog" in labels
    assert few.startswith("held out    8;")
    assert ray_stream.open_configured(found).rows.num_rows == 32


def test_the_same_images_are_prepared_once_and_changed_ones_again(tmp_path: Path) -> None:
    pets = "pets" * 60  # with the data set's suffix it would be too long for a folder's name
    write_images(tmp_path / pets, 4)
    config = config_of(tmp_path, tmp_path / pets)
    first = str(prepare_for_run.prepared(config).data.shards)
    before = {path: path.stat().st_mtime_ns for path in Path(first).rglob("*")}
    assert prepare_for_run.prepared(config).data.shards == first
    # Also where files have other times, as after an unzip or a checkout.
    shutil.copytree(tmp_path / pets, tmp_path / "moved" / pets, copy_function=shutil.copyfile)
    assert prepare_for_run.prepared(config_of(tmp_path, tmp_path / "moved" / pets)).data.shards == first
    assert {path: path.stat().st_mtime_ns for path in Path(first).rglob("*")} == before
    larger = override(config, {"model.image_size": 16})
    write_images(tmp_path / pets, 1, seed=1)
    more = prepare_for_run.prepared(config).data.shards
    image = tmp_path / pets / "cat/0-0.png"
    times = image.stat()
    edited = bytearray(image.read_bytes())
    edited[-1] ^= 1
    image.write_bytes(edited)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    other = prepare_for_run.prepared(config).data.shards
    assert len({first, more, other, prepare_for_run.prepared(larger).data.shards}) == 4


def test_new_images_are_described_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "pets", 10)
    shutil.copy(tmp_path / "pets/cat/0-0.png", tmp_path / "pets/cat/again.png")
    config = prepare_for_run.prepared(config_of(tmp_path, tmp_path / "pets"))
    out = capsys.readouterr().out
    assert re.search(
        r"^duplicates  1 of 21 images look like another, \d like one of another split$", out, re.M
    )
    assert f"{config.data.shards}/duplicates.png, " in out
    prepare_for_run.prepared(config_of(tmp_path, tmp_path / "pets"))
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ["images", "labels", "held"]


def test_ray_starts_while_images_are_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "pets", 10)
    config = config_of(tmp_path, tmp_path / "pets")
    calls = []
    prepared = prepare_for_run.prepared(config, connect=lambda: calls.append("connected"))
    for thread in threading.enumerate():
        if thread.name == prepare_for_run.REPORTING:
            thread.join()
    assert "duplicates  " in capsys.readouterr().out
    assert prepare_for_run.prepared(config, connect=lambda: calls.append("again")) == prepared
    assert calls == ["connected"]


def test_a_folder_that_cannot_be_prepared_is_an_error_of_the_caller(tmp_path: Path) -> None:
    write_images(tmp_path / "pets", 10)
    (tmp_path / "pets/cat/broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read"):
        prepare_for_run.prepared(config_of(tmp_path, tmp_path / "pets"), connect=lambda: None)


def test_a_damaged_shard_is_made_again_as_its_error_says(tmp_path: Path) -> None:
    config = prepare_for_run.prepared(config_of(tmp_path, None))
    shards = Path(str(config.data.shards))
    data_set = ray_stream.open_configured(config)
    before = (shards / MANIFEST).read_bytes()
    plan = data_set.plan(0, 8192)
    damaged.damage_row_group(shards, 0, 0)
    with pytest.raises(CorruptData) as caught:
        data_set.read(plan, 0, 1500)
    message = rf"{shards}/train/00000\.parquet, row group 0: .*; remove the data set, and run the command"
    assert re.match(message, str(caught.value))
    shutil.rmtree(shards)
    assert prepare_for_run.prepared(config_of(tmp_path, None)).data.shards == config.data.shards
    assert (shards / MANIFEST).read_bytes() == before
    assert len(data_set.read(plan, 0, 1500).image) == 1500


def test_skipping_does_not_change_which_data_set_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "pets", 20)
    (tmp_path / "pets/cat/0-0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"--data\.skip-unreadable.*0-0\.png"):
        prepare_for_run.prepared(config_of(tmp_path, tmp_path / "pets"))
    skipping = prepare_for_run.prepared(
        config_of(tmp_path, tmp_path / "pets", **{"data.skip_unreadable": True})
    )
    assert "left out    1 image that cannot be read, listed in" in capsys.readouterr().out
    later = prepare_for_run.prepared(config_of(tmp_path, tmp_path / "pets"))
    assert later.data.shards == skipping.data.shards
    check_same_run(skipping, later, "the checkpoint")


def test_user_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "pets", 2)
    (tmp_path / "pets/cat/0-0.png").write_bytes(b"no picture")
    for images, changes, message in (
        ("nowhere", {}, "--data.images nowhere is not a folder"),
        ("s3://b/c", {}, "--data.images s3://b/c is not a folder"),
        (tmp_path / "pets", {"data.shards": "x"}, "--data.images and --data"),
        (tmp_path / "pets", {"model.channels": 2}, "model.channels is 2"),
        (tmp_path / "empty", {}, f"{tmp_path}/empty holds no images"),
        (tmp_path / "pets", {}, "1 of 4 images cannot be read ("),
        (None, {"data.source": None}, "--data.images"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            prepare_for_run.prepared(config_of(tmp_path, images, **changes))
        assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_training_on_an_image_folder_and_resuming(run_job: Callable[..., Any], tmp_path: Path) -> None:
    """The same command resumes; after the images have changed it is an error."""
    write_images(tmp_path / "pets", 20)
    words = (
        "digits --data.images pets --model.channels 3 --model.num-classes 2 --name a --batch-size 64".split()
    )
    words += "--model.base-width 8 --model.norm-groups 4 --schedule.num-timesteps 50 --workers 1".split()
    for total in (128, 256):
        done = run_job("train", *words, "--total-images", total, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "images      pets, as 8x8 colour" in done.stdout
        assert f"trained     {total} images" in done.stdout
    assert (tmp_path / "runs/a/checkpoint-000000000128-g1").exists()
    evaluated = run_job("evaluate", "runs/a", "--num-images", "20", cwd=tmp_path)
    assert evaluated.returncode == 2 and "has 8 images in its split test" in evaluated.stderr
    write_images(tmp_path / "pets", 1, seed=1)
    done = run_job("train", *words, "--total-images", 512, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    advice = re.search(
        r"was trained on other data, .*; go on with (--data \S+), not with --data.images", done.stderr
    )
    assert advice
    earlier = [*words[:1], *words[3:], *advice[1].split()]
    done = run_job("train", *earlier, "--total-images", 512, cwd=tmp_path)
    assert done.returncode == 0 and "trained     512 images" in done.stdout, done.stderr
