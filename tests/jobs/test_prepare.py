"""From the prepare command to a data set; interrupted, repeated, rejected; on disk and on S3."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm.data.image_folder import Folder
from ddpm.data.manifest import Manifest, read_manifest
from ddpm.data.prepare import find, prepare, write_preview
from ddpm.data.shards import read_row_group
from ddpm.data.sources import Digits
from ddpm.storage.locations import Location, resolve
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Numbers:
    """A source of 40 + 10 images; all pixels of an image have its number as value."""

    encoding: Any = "raw"
    fail_at: int = 99
    name: str = field(default="numbers", init=False)
    height: int = field(default=2, init=False)
    width: int = field(default=3, init=False)
    channels: int = field(default=1, init=False)
    class_names: tuple[str, ...] = field(default=("even", "odd"), init=False)
    reads: list[int] = field(default_factory=list, compare=False)

    @property
    def splits(self) -> dict[str, int]:
        return {"train": 40, "test": 10}

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "encoding": self.encoding}

    def read(self, split: str, start: int, stop: int) -> tuple[np.ndarray | Sequence[bytes], np.ndarray]:
        first = start + (100 if split == "test" else 0)
        self.reads.append(first)
        if start <= self.fail_at < stop:
            raise UserError("image is broken")
        numbers = np.arange(first, first + stop - start)
        pixels = np.broadcast_to(numbers[:, None, None, None], (len(numbers), 2, 3, 1)).astype(np.uint8)
        if self.encoding == "raw":
            return pixels, numbers % 2
        files = []
        for image in pixels:
            file = io.BytesIO()
            Image.fromarray(image[..., 0]).save(file, "PNG")
            files.append(file.getvalue())
        return files, numbers % 2


def numbers_in(location: Location, manifest: Manifest, split: str) -> list[int]:
    groups = range(sum(len(shard.row_groups) for shard in manifest.splits[split].shards))
    read = [read_row_group(location, manifest, split, i) for i in groups]
    numbers = np.concatenate([image[:, 0, 0, 0] for image, _ in read]).tolist()
    assert np.concatenate([label for _, label in read if label is not None]).tolist() == [
        n % 2 for n in numbers
    ]
    return [int(n) for n in numbers]


SMALL: dict[str, Any] = {"rows_per_shard": 10, "rows_per_row_group": 5}


@pytest.mark.parametrize("encoding", ["raw", "encoded"])
def test_all_images_are_written_in_order(tmp_path: Path, encoding: str) -> None:
    progress: list[tuple[int, int]] = []
    manifest = prepare(
        Numbers(encoding), resolve(str(tmp_path)), on_progress=lambda *done: progress.append(done), **SMALL
    )
    assert manifest == read_manifest(resolve(str(tmp_path)))
    assert numbers_in(resolve(str(tmp_path)), manifest, "train") == list(range(40))
    assert numbers_in(resolve(str(tmp_path)), manifest, "test") == list(range(100, 110))
    assert [shard.row_groups for shard in manifest.splits["train"].shards] == [(5, 5)] * 4
    assert progress == [(10, 50), (20, 50), (30, 50), (40, 50), (50, 50)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "test", "train"]


def test_a_stopped_preparation_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="broken"):
        prepare(Numbers(fail_at=30), resolve(str(tmp_path / "x")), **SMALL)
    with pytest.raises(UserError, match="no data set"):
        read_manifest(resolve(str(tmp_path / "x")))
    # Meanwhile a finished shard is damaged, and the progress file of another one.
    shard = tmp_path / "x/train/00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "x/_prepare/train-00001.parquet.json").write_text("{")
    with pytest.raises(UserError, match="broken"):
        prepare(Numbers(fail_at=30), resolve(str(tmp_path / "x")), **SMALL)
    source = Numbers()
    resumed = prepare(source, resolve(str(tmp_path / "x")), **SMALL)
    assert source.reads == [30, 100]
    assert resumed == prepare(Numbers(), resolve(str(tmp_path / "y")), **SMALL)
    files = sorted(p.relative_to(tmp_path / "y") for p in (tmp_path / "y").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "x") for p in (tmp_path / "x").rglob("*") if p.is_file())
    assert all((tmp_path / "x" / f).read_bytes() == (tmp_path / "y" / f).read_bytes() for f in files)


def test_a_finished_data_set_is_found_and_never_overwritten(tmp_path: Path) -> None:
    assert find(Numbers(), resolve(str(tmp_path))) is None
    first = prepare(Numbers(), resolve(str(tmp_path)))
    source = Numbers()
    assert prepare(source, resolve(str(tmp_path))) == find(source, resolve(str(tmp_path))) == first
    assert source.reads == []
    others: list[tuple[Any, dict[str, Any]]] = [(Digits(), {}), (Numbers("encoded"), {}), (Numbers(), SMALL)]
    for other, options in others:
        with pytest.raises(UserError, match="s3://b/x holds another data set, of source 'numbers'"):
            prepare(other, replace(resolve(str(tmp_path)), uri="s3://b/x"), **options)
    assert read_manifest(resolve(str(tmp_path))) == first


def test_another_source_cannot_resume_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="broken"):
        prepare(Numbers(fail_at=30), resolve(str(tmp_path)), **SMALL)
    with pytest.raises(UserError, match="holds an unfinished data set"):
        prepare(replace(Numbers(), encoding="encoded"), resolve(str(tmp_path)), **SMALL)


def test_the_preview_shows_images_from_the_whole_data_set(tmp_path: Path) -> None:
    manifest = prepare(Numbers(), resolve(str(tmp_path)), **SMALL)
    with Image.open(write_preview(resolve(str(tmp_path)), manifest).path) as image:
        shown = set(np.asarray(image)[..., 0].flatten().tolist()) - {255}
    assert {0, 39} <= shown <= set(range(40)) and len(shown) > 20


@pytest.mark.slow
def test_ray_tasks_give_the_same_data_set(tmp_path: Path) -> None:
    import ray

    here = prepare(Digits(), resolve(str(tmp_path / "here")), rows_per_shard=500)
    images_folder = tmp_path / "pictures"
    images_folder.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)):
        Image.fromarray(image).save(images_folder / f"{i}.png")
    whole = (images_folder / "3.png").read_bytes()
    (images_folder / "3.png").write_bytes(whole[:-100])  # its header is valid, so that only a task detects it
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        there = prepare(Digits(), resolve(str(tmp_path / "there")), rows_per_shard=500, parallel=True)
        with pytest.raises(UserError, match=r"^cannot read the image .*3\.png") as caught:
            prepare(
                Folder(images_folder, size=8),
                resolve(str(tmp_path / "broken")),
                rows_per_shard=2,
                parallel=True,
            )
    finally:
        ray.shutdown()
    assert here == there
    assert "Traceback" not in str(caught.value)


def test_on_s3(s3_bucket: str) -> None:
    location = resolve(f"{s3_bucket}/some/numbers")
    with pytest.raises(UserError, match="broken"):
        prepare(Numbers(fail_at=30), location, **SMALL)
    with pytest.raises(UserError, match="no data set"):
        read_manifest(location)
    source = Numbers()
    manifest = prepare(source, location, **SMALL)
    assert source.reads == [30, 100]
    assert read_manifest(location) == manifest
    assert numbers_in(location, manifest, "train") == list(range(40))
    assert not location.child("_prepare").exists()
    write_preview(location, manifest)
    assert location.child("preview.png").read().startswith(b"\x89PNG")


def test_the_command(tmp_path: Path, run_job: Callable[..., Any]) -> None:
    done = run_job("prepare", "digits", tmp_path / "digits")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    raw = json.loads((tmp_path / "digits/manifest.json").read_text())
    assert done.returncode == 0, done.stderr
    assert lines["data"] == f"set    {tmp_path}/digits" and lines["train"] == "1,500 images"
    assert lines["fingerprint"] == raw["fingerprint"]
    with Image.open(lines["preview"]) as image:
        assert image.size == (402, 402)
    again = run_job("prepare", "digits", tmp_path / "digits")
    assert again.returncode == 0 and "exists already" in again.stdout
    other = run_job("prepare", "glyphs", tmp_path / "digits")
    assert other.returncode == 2
    assert other.stderr == (
        f"error: {tmp_path}/digits holds another data set, of source 'digits' or made with other options; choose "
        "another place, or remove that one first\n"
    )


def test_the_command_on_an_image_folder(tmp_path: Path, run_job: Callable[..., Any]) -> None:
    for i in range(20):
        (tmp_path / f"in/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30), (i, 0, 0)).save(tmp_path / f"in/{'ab'[i % 2]}/{i}.jpg")
    done = run_job("prepare", "folder", tmp_path / "out", "--path", tmp_path / "in", "--size", 16)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(resolve(str(tmp_path / "out")))
    assert (manifest.height, manifest.channels, manifest.class_names) == (16, 3, ("a", "b"))
    (tmp_path / "in/a/0.jpg").write_bytes(b"broken")
    done = run_job("prepare", "folder", tmp_path / "out2", "--path", tmp_path / "in", "--size", 16)
    assert done.returncode == 2 and done.stderr.startswith(
        f"error: cannot read the image {tmp_path}/in/a/0.jpg"
    )
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out2/manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder", "out", "--path", "nowhere", "--size", "16"], "nowhere is not a folder; --path"),
        (["torchvision", "out", "--dataset", "mnist"], "data/MNIST/raw lacks train-images-idx3-ubyte"),
        (["digits", "ftp://x"], "unknown scheme 'ftp'"),
    ],
)
def test_user_errors_are_one_line(arguments: list[str], message: str, run_job: Callable[..., Any]) -> None:
    done = run_job("prepare", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
