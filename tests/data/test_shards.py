"""Shards: written data is read back, writing is deterministic, damage and changes are detected."""

import dataclasses
import io
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddpm.data import row_group
from ddpm.data.manifest import (
    Manifest,
    Shard,
    make_manifest,
    manifest_from_json,
    read_manifest,
    write_manifest,
)
from ddpm.data.row_group import CorruptData, content_sha256, decode
from ddpm.data.shards import read_row_group, write_shard
from ddpm.runs.storage import resolve
from ddpm.utils.errors import UserError


def pixels(n: int, height: int = 4, width: int = 5, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), np.uint8)


def image_file(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(file, kind)
    return file.getvalue()


def write(root: Path, images: Any, labels: np.ndarray | None = None, rows: int = 4) -> Manifest:
    """A data set of two shards, the second half as long."""
    n = len(images)
    cut = 2 * n // 3
    shards = [
        write_shard(
            resolve(str(root)),
            f"train/{i:05d}.parquet",
            images[part],
            None if labels is None else labels[part],
            rows_per_row_group=rows,
        )
        for i, part in enumerate((slice(cut), slice(cut, None)))
    ]
    names = [] if labels is None else ["a", "b", "c"]
    encoding = "raw" if isinstance(images, np.ndarray) else "encoded"
    manifest = make_manifest("test", (4, 5, 3), encoding, names, {"train": shards}, "options")
    write_manifest(resolve(str(root)), manifest)
    return read_manifest(resolve(str(root)))


@pytest.mark.parametrize("encoded", [False, True])
def test_written_images_are_read_back(tmp_path: Path, encoded: bool) -> None:
    images = pixels(15)
    labels = np.arange(15) % 3
    manifest = write(tmp_path, [image_file(image) for image in images] if encoded else images, labels)
    groups = [rows for shard in manifest.splits["train"].shards for rows in shard.row_groups]
    assert groups == [4, 4, 2, 4, 1]
    read = [read_row_group(resolve(str(tmp_path)), manifest, "train", i) for i in range(len(groups))]
    assert (np.concatenate([image for image, _ in read]) == images).all()
    assert np.concatenate([label for _, label in read if label is not None]).tolist() == labels.tolist()
    some, label = read_row_group(resolve(str(tmp_path)), manifest, "train", 1, rows=np.array([3, 0]))
    assert (some == images[[7, 4]]).all()
    assert label is not None and label.tolist() == [1, 1]
    assert encoded or not read[0][0].flags.owndata  # raw pixels are not copied
    with pytest.raises(IndexError):
        read_row_group(resolve(str(tmp_path)), manifest, "train", 5)


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", pixels(9), np.arange(9) % 3)
    second = write(tmp_path / "b", pixels(9), np.arange(9) % 3)
    assert first == second
    assert (tmp_path / "a/train/00000.parquet").read_bytes() == (
        tmp_path / "b/train/00000.parquet"
    ).read_bytes()
    other = write(tmp_path / "c", pixels(9, seed=1), np.arange(9) % 3)
    assert other.fingerprint != first.fingerprint


def test_a_folder_without_a_manifest_is_a_user_error(tmp_path: Path) -> None:
    write(tmp_path, pixels(6))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"s3://b/x.*ddpm prepare"):
        read_manifest(dataclasses.replace(resolve(str(tmp_path)), uri="s3://b/x"))


def shard_of(raw: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = raw["splits"]["train"]["shards"][0]
    return shard


ALTERED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda raw: raw.update(format="ddpm-shards/1"), "format is 'ddpm-shards/1'"),
    (lambda raw: raw.update(encoding="jpeg"), "encoding is 'jpeg'"),
    (lambda raw: raw.update(width=6), "fingerprint"),
    (lambda raw: raw.update(fingerprint="0" * 64), "fingerprint"),
    (lambda raw: raw["splits"]["train"].update(fingerprint="0" * 64), "fingerprint"),
    (lambda raw: raw["splits"]["train"].update(num_rows=7), "fingerprint"),
    (lambda raw: raw["splits"]["train"].update(num_rows=-1), "splits.train.num_rows is -1"),
    (lambda raw: shard_of(raw).update(num_rows=3), "fingerprint"),
    (lambda raw: shard_of(raw).update(row_groups=[0, 4]), "row_groups.0 is 0"),
    (lambda raw: shard_of(raw).update(row_groups=[3, 1], row_group_sha256=["0" * 64] * 2), "fingerprint"),
    (lambda raw: shard_of(raw).update(sha256="0" * 64), "fingerprint"),
    (lambda raw: shard_of(raw).update(row_group_sha256=["0" * 64]), "fingerprint"),
]


@pytest.mark.parametrize(("alter", "message"), ALTERED)
def test_an_altered_manifest_is_rejected(
    tmp_path: Path, alter: Callable[[dict[str, Any]], object], message: str
) -> None:
    raw = json.loads(json.dumps(dataclasses.asdict(write(tmp_path, pixels(6)))))
    assert manifest_from_json(json.dumps(raw), "here/manifest.json").splits["train"].num_rows == 6
    alter(raw)
    with pytest.raises(UserError, match=rf"^here/manifest\.json: .*{message}"):
        manifest_from_json(json.dumps(raw), "here/manifest.json")


def test_a_wrong_byte_anywhere_is_detected(tmp_path: Path) -> None:
    manifest = write(tmp_path, pixels(6), np.zeros(6, np.int64))
    path = tmp_path / "train/00000.parquet"
    whole = path.read_bytes()
    images, _ = read_row_group(resolve(str(tmp_path)), manifest, "train", 0)
    images = images.copy()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            read, _ = read_row_group(resolve(str(tmp_path)), manifest, "train", 0)
        except CorruptData as error:
            assert "train/00000.parquet" in str(error)
        else:  # bytes without effect: software names, unused statistics
            assert (read == images).all()


def test_a_storage_error_is_not_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write(tmp_path, pixels(6))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("timeout")

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(OSError, match="timeout"):
        read_row_group(resolve(str(tmp_path)), manifest, "train", 0)


IMAGES = pa.array([b"a" * 60] * 3, pa.binary(60))
LABELS = pa.array([0, 1, 2])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": LABELS}, "column image is missing"),
        ({"image": IMAGES.cast(pa.binary()), "label": LABELS}, "column image is binary"),
        ({"image": IMAGES[:2], "label": LABELS[:2]}, "2 rows"),
        ({"image": IMAGES, "label": LABELS}, "checksum"),
    ],
)
def test_a_shard_of_another_data_set_is_rejected(
    tmp_path: Path, columns: dict[str, pa.Array], message: str
) -> None:
    file = tmp_path / "train/00000.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table(columns), file)
    shard = Shard("train/00000.parquet", 3, (3,), file.stat().st_size, "0" * 64, ("0" * 64,))
    manifest = make_manifest("test", (4, 5, 3), "raw", ["a", "b", "c"], {"train": [shard]}, "")
    with pytest.raises(CorruptData, match=rf"train/00000\.parquet, row group 0: .*{message}"):
        read_row_group(resolve(str(tmp_path)), manifest, "train", 0)


def test_the_checksum_of_a_row_group_depends_on_its_content(tmp_path: Path) -> None:
    images = pixels(6)
    labels = np.arange(6) % 3
    raw = write(tmp_path / "raw", images, labels).splits["train"].shards
    parts = [(0, 4), (4, 6)]
    expected = [
        sha256(images[a:b].tobytes() + labels[a:b].astype("<i8").tobytes()).hexdigest() for a, b in parts
    ]
    assert [*raw[0].row_group_sha256, *raw[1].row_group_sha256] == expected
    files = [image_file(image) for image in images]
    encoded = write(tmp_path / "encoded", files).splits["train"].shards
    expected = [
        sha256(np.array([*map(len, files[a:b])], "<i8").tobytes() + b"".join(files[a:b])).hexdigest()
        for a, b in parts
    ]
    assert [*encoded[0].row_group_sha256, *encoded[1].row_group_sha256] == expected


def test_checksums_include_the_boundaries_of_encoded_images() -> None:
    ab_c = pa.array([b"ab", b"c"])
    a_bc = pa.array([b"a", b"bc"])
    assert content_sha256(ab_c, None) != content_sha256(a_bc, None)
    longer = pa.array([b"x", b"ab", b"c", b"y"])  # the checksum of a slice covers only its own rows
    assert content_sha256(longer[1:3], None) == content_sha256(ab_c, None)
    assert content_sha256(pa.array([b"xx", b"yy"], pa.binary(2))[1:], None) == sha256(b"yy").hexdigest()


def test_a_bad_label_is_an_error_with_its_row(tmp_path: Path) -> None:
    manifest = write(tmp_path, pixels(6), np.array([0, 1, 3, 2, 1, -1]))
    with pytest.raises(CorruptData, match="row group 0, row 2: the label is 3"):
        read_row_group(resolve(str(tmp_path)), manifest, "train", 0)
    assert len(read_row_group(resolve(str(tmp_path)), manifest, "train", 0, rows=np.array([3, 1]))[0]) == 2
    with pytest.raises(CorruptData, match=r"00001\.parquet, row group 0, row 1: the label is -1"):
        read_row_group(resolve(str(tmp_path)), manifest, "train", 1)


def test_a_bad_image_is_an_error_with_its_row(tmp_path: Path) -> None:
    good = image_file(pixels(1)[0])
    for bad in (b"", good[:40], good[:60], image_file(pixels(1, 5, 4)[0])):
        manifest = write(tmp_path, [good, good, bad, good, good, good])
        with pytest.raises(CorruptData, match=r"train/00000\.parquet, row group 0, row 2: the image"):
            read_row_group(resolve(str(tmp_path)), manifest, "train", 0)
        read_row_group(resolve(str(tmp_path)), manifest, "train", 0, rows=np.array([0, 1, 3]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8, 16])
@pytest.mark.lowest
def test_the_fast_jpeg_decoder_agrees_with_pillow(
    channels: int, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8)
    files = []
    for mode in ("RGB", "L", "CMYK"):
        for subsampling in (0, 1, 2):
            for progressive in (False, True):
                file = io.BytesIO()
                image = Image.fromarray(noise).convert(mode)
                image.save(file, "JPEG", subsampling=subsampling, progressive=progressive)
                files.append(file.getvalue())
    middle = len(files[0]) // 2
    files.append(files[0][:middle] + b"\0\0\0\0" + files[0][middle + 4 :])  # Pillow decodes what it can
    files.append(files[0][:middle])  # and rejects this

    def decoded() -> list[np.ndarray | str]:
        found: list[np.ndarray | str] = []
        for file in files:
            try:
                found.append(decode(file, 48, 96, channels, scale))
            except ValueError as error:
                found.append(str(error))
        return found

    quickly = decoded()
    monkeypatch.setattr(row_group, "_jpeg", lambda *args: None)
    for quick, slow in zip(quickly, decoded(), strict=True):
        np.testing.assert_array_equal(quick, slow)
    assert isinstance(quickly[-1], str) and "truncated" in quickly[-1]
    assert sum(isinstance(found, str) for found in quickly) == 1


def test_the_fast_decoder_is_used_for_common_jpegs() -> None:
    """If it were used for none, the test above would prove nothing."""
    colours = np.zeros((16, 16, 3), np.uint8)
    for image, channels in ((colours, 3), (colours[:, :, :1], 1)):
        file = image_file(image, "JPEG")
        assert row_group._jpeg(file, 16, 16, channels, 2) is not None
        assert (
            row_group._jpeg(file, 16, 16, 4 - channels, 2) is None
        )  # Pillow computes grey values differently
        assert row_group._jpeg(file[:-20], 16, 16, channels, 2) is None


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decode_returns_the_requested_channels(kind: str, channels: int) -> None:
    grey = np.full((8, 8, 1), 100, np.uint8)
    for stored in (grey, grey.repeat(3, axis=2)):
        decoded = decode(image_file(stored, kind), 8, 8, channels)
        assert decoded.shape == (8, 8, channels) and decoded.dtype == np.uint8
        assert abs(decoded.astype(int) - 100).max() <= 1
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(image_file(grey, "GIF"), 8, 8, channels)
