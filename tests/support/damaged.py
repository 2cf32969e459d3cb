"""A data set of numbered images, and ways to damage it."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from ddpm.data.manifest import make_manifest, read_manifest, write_manifest
from ddpm.data.reading import DataSet
from ddpm.data.shards import write_shard
from ddpm.runs.storage import Location, resolve

SIDE = 4
ROWS = 8
NUM_IMAGES = 60
"""Shards of 24, 24 and 12 images, in row groups of 8; the last one has 4."""
PLAN = (3, 32)
"""Seed and rows of a window: four row groups, more than a shard has."""


def pixels(number: int, side: int = SIDE) -> np.ndarray:
    return np.full((side, side, 1), number, np.uint8)


def png(number: int, side: int = SIDE) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number, side)[..., 0]).save(file, "PNG")
    return file.getvalue()


def prepare(
    uri: str,
    *,
    encoded: bool = False,
    bad_files: dict[int, bytes] | None = None,
    bad_labels: dict[int, int] | None = None,
) -> Location:
    """Write a data set whose image i has pixel value i and label i mod 7, except for `bad_files` and `bad_labels`."""
    location = resolve(uri)
    labels = np.arange(NUM_IMAGES) % 7
    for i, label in (bad_labels or {}).items():
        labels[i] = label
    shards = []
    for k, start in enumerate(range(0, NUM_IMAGES, 3 * ROWS)):
        part = range(start, min(start + 3 * ROWS, NUM_IMAGES))
        files = [(bad_files or {}).get(i, png(i)) for i in part]
        content = files if encoded else np.stack([pixels(i) for i in part])
        of_part = labels[part.start : part.stop]
        path = f"train/{k:05d}.parquet"
        shards.append(write_shard(location, path, content, of_part, rows_per_row_group=ROWS))
    encoding = "encoded" if encoded else "raw"
    names = [str(i) for i in range(7)]
    manifest = make_manifest("numbers", (SIDE, SIDE, 1), encoding, names, {"train": shards}, "")
    write_manifest(location, manifest)
    return location


def opened(location: Location, timeout_s: float = 0.0) -> DataSet:
    manifest = read_manifest(location)
    return DataSet(location, manifest, "train", timeout_s)


def damage_row_group(root: Path, shard: int, row_group: int) -> None:
    """Change one byte of a row group, so that its checksum no longer matches; the other row groups stay intact."""
    path = root / f"train/{shard:05d}.parquet"
    column = pq.ParquetFile(path).metadata.row_group(row_group).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    path.write_bytes(data)


def rewrite(root: Path, shard: int, change: Callable[[bytes], bytes | None]) -> None:
    """Replace a shard's bytes; None removes it."""
    path = root / f"train/{shard:05d}.parquet"
    data = change(path.read_bytes())
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
