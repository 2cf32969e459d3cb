"""Writers of generated images to a folder or bucket; they know which images are missing.

    request.json    everything that determines the images, written first; another request is refused
    images/000000.png ...                   PngWriter
    train/00000.parquet ...  manifest.json  ShardWriter: a data set to train on, which exists once it is complete
    grid.png        the first 64

A file is complete or absent, so after a crash existing images need not be sampled again.

Axes: N images, H W, C channels.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddpm.config_io import differences
from ddpm.data import prepare
from ddpm.data.manifest import MANIFEST, Shard, make_manifest, read_manifest, write_manifest
from ddpm.data.shards import kept_shard, read_row_group, write_shard
from ddpm.storage.locations import Location
from ddpm.utils import images, strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.images import Pixels

Form = Literal["png", "parquet"]
Labels = NDArray[np.int64]

REQUEST = "request.json"
GRID = "grid.png"
GRID_IMAGES = 64
IMAGES = "images"
SPLIT = "train"
IMAGES_PER_SHARD = 512
"""Approximate, since a shard holds whole pieces. An incomplete shard is lost with its process."""
RESERVED_NAMES = (IMAGES, SPLIT, GRID, MANIFEST)
"""Names that make a folder without a request.json unusable: its images are unknown."""
NAME = re.compile(r"[0-9]{6}\.png|[1-9][0-9]{6,}\.png")
COMPRESSION = 4
"""Assumed compression: images need a quarter of the bytes of their pixels, and a PNG at least one disk block."""
GB = 10**9


def check_room(location: Location, num_images: int, form: Form, shape: tuple[int, int, int]) -> None:
    """Raise UserError if a folder's disk certainly has too little space for so many images of this (H, W, C)."""
    if not location.is_local:
        return
    path = Path(location.path)
    disk = next(folder for folder in (path, *path.parents) if folder.exists())
    least = int(np.prod(shape)) / COMPRESSION
    if form == "png":
        least = max(least, os.statvfs(disk).f_frsize)
    needed, free = num_images * least, shutil.disk_usage(disk).free
    if needed > free and needed > free + _bytes_in(path):
        raise UserError(
            f"{num_images:,} images need {needed / GB:,.1f} GB or more, but {location.uri} has {free / GB:,.1f} GB "
            "free; ask for fewer with --num-images, or name another --out"
        )


def begin(location: Location, asked: Mapping[str, Any]) -> None:
    """Write the request at `location`, or check that it is the same as before.

    Args:
        asked: everything that determines the images, as flat JSON.
    """
    note, text = location.child(REQUEST), json.dumps(asked, indent=2) + "\n"
    location.sweep()
    if not note.exists():
        if taken := [name for name in RESERVED_NAMES if location.child(name).exists()]:
            raise UserError(
                f"{location.uri} has {taken[0]} but no {REQUEST}, so it is unknown which images it holds; use another "
                "--out"
            )
        note.write(text.encode())
        return
    before = strict_json.parse(dict[str, Any], note.read(), f"{note.uri} is damaged; use another --out")
    if changed := differences(before, json.loads(text)):
        raise UserError(
            f"{location.uri} holds images of another request: {changed}; use those values, or another --out"
        )


class PngWriter:
    """One PNG per image; a larger num_images adds to them."""

    num_kept: int
    """Images of the pieces that were complete at the start."""

    def __init__(self, location: Location, num_images: int, batch_size: int) -> None:
        self._location, self._num_images, self._size = location, num_images, batch_size
        self._images = location.child(IMAGES)
        self._images.sweep()
        numbers = (int(name[:-4]) for name in self._images.files() if NAME.fullmatch(name))
        counts = Counter(i // batch_size for i in numbers if i < num_images)
        self._whole = {k for k, count in counts.items() if count == len(_piece(k, batch_size, num_images))}
        self.num_kept = sum(counts[k] for k in self._whole)

    def missing(self, piece: range) -> bool:
        """Whether an image of the piece was missing at the start."""
        return piece.start // self._size not in self._whole

    def write(self, piece: range, pixels: Pixels, labels: Labels | None) -> None:
        """Store the images with these indices, uint8 [N, H, W, C], and their labels int64 [N]."""
        for i, image in zip(piece, pixels, strict=True):
            self._images.child(_name(i)).write(images.png_bytes(image))

    def close(self) -> None:
        """Write the grid, and the manifest of shards, after the last image."""
        first = range(min(self._num_images, GRID_IMAGES))
        pixels = [images.from_png(self._images.child(_name(i)).read()) for i in first]
        self._location.child(GRID).write(images.png_bytes(images.grid(np.stack(pixels))))


class ShardWriter:
    """As PngWriter, but shards and, last, their manifest: a data set with the one split "train".

    Args:
        num_images: N; part of the request, since a data set cannot grow.
        batch_size: images per piece.
        shape: (H, W, C).
        class_names: names of the labels; empty: there are no labels.
        asked: the request, which `location` holds.
    """

    def __init__(
        self,
        location: Location,
        num_images: int,
        batch_size: int,
        shape: tuple[int, int, int],
        class_names: Sequence[str],
        asked: Mapping[str, Any],
    ) -> None:
        self._location, self._shape, self._class_names = location, shape, class_names
        self._options = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        size = batch_size * max(1, round(IMAGES_PER_SHARD / batch_size))
        self._rows_per_row_group = min(size, max(1, prepare.ROW_GROUP_BYTES // int(np.prod(shape))))
        self._size, self._num_images = size, num_images
        self._begun: dict[int, dict[range, tuple[Pixels, Labels | None]]] = {}
        self._is_complete = location.child(MANIFEST).exists()
        self._shards = {} if self._is_complete else self._kept_shards()
        kept = (len(_piece(k, size, num_images)) for k in self._shards)
        self.num_kept = num_images if self._is_complete else sum(kept)

    def missing(self, piece: range) -> bool:
        return not self._is_complete and piece.start // self._size not in self._shards

    def _kept_shards(self) -> dict[int, Shard]:
        """Shards that an earlier process finished, found by listing the folder."""
        names = (name.removesuffix(".parquet") for name in self._location.child(SPLIT).files())
        numbers = {int(name) for name in names if name.isdecimal()}
        pieces = {k: _piece(k, self._size, self._num_images) for k in sorted(numbers)}
        shards = {k: kept_shard(self._location, _path(k), len(piece)) for k, piece in pieces.items() if piece}
        return {k: shard for k, shard in shards.items() if shard}

    def write(self, piece: range, pixels: Pixels, labels: Labels | None) -> None:
        k = piece.start // self._size
        parts = self._begun.setdefault(k, {})
        parts[piece] = pixels, labels
        if sum(map(len, parts)) < len(_piece(k, self._size, self._num_images)):
            return
        ordered = [parts[piece] for piece in sorted(parts, key=lambda piece: piece.start)]
        labelled = [part for _, part in ordered if part is not None]
        self._shards[k] = write_shard(
            self._location,
            _path(k),
            np.concatenate([part for part, _ in ordered]),
            np.concatenate(labelled) if labelled else None,
            rows_per_row_group=self._rows_per_row_group,
        )
        del self._begun[k]

    def close(self) -> None:
        if self._is_complete:
            manifest = read_manifest(self._location)
        else:
            shards = [self._shards[k] for k in range(math.ceil(self._num_images / self._size))]
            manifest = make_manifest(
                "drawn", self._shape, "raw", self._class_names, {SPLIT: shards}, self._options
            )
        pixels, group = np.zeros((0, *self._shape), np.uint8), 0
        while len(pixels) < min(GRID_IMAGES, manifest.splits[SPLIT].num_rows):
            more, _ = read_row_group(self._location, manifest, SPLIT, group)
            pixels, group = np.concatenate([pixels, more]), group + 1
        self._location.child(GRID).write(images.png_bytes(images.grid(pixels[:GRID_IMAGES])))
        if not self._is_complete:
            write_manifest(self._location, manifest)


def _piece(k: int, size: int, num_images: int) -> range:
    return range(k * size, min((k + 1) * size, num_images))


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def _name(i: int) -> str:
    return f"{i:06d}.png"


def _path(k: int) -> str:
    return f"{SPLIT}/{k:05d}.parquet"
