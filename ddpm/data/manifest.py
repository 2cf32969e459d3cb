"""The description of a data set in one file: manifest.json, written last.

A manifest is untrusted: every field is checked before it is used, no path in it can leave the data set's folder, and
its fingerprints are recomputed, so that the data that a run records is the data that it read.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from annotated_types import Interval

from ddpm.storage.locations import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

MANIFEST = "manifest.json"
FORMAT: Final = "ddpm-shards/2"
MAX_SIDE = 16_384
MAX_COUNT = 10**12
MAX_ROW_GROUP_BYTES = 1 << 31
"""Largest decoded row group, which one task holds in memory; `prepare` writes row groups of about 4 MB."""
MAX_MANIFEST_BYTES = 256 << 20
"""Enough for 2.6 million row groups; reading a manifest takes 5 times as much memory."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Encoding = Literal["raw", "encoded"]
Count = Annotated[int, Interval(ge=1, le=MAX_COUNT)]
Side = Annotated[int, Interval(ge=1, le=MAX_SIDE)]


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    path: str
    """Below the data set's folder: "train/00000.parquet"."""
    num_rows: Count
    row_groups: tuple[Count, ...]
    """Rows of every row group, in order."""
    num_bytes: Count
    sha256: str
    """SHA-256 of the file."""
    row_group_sha256: tuple[str, ...]
    """SHA-256 of the content of every row group, `shards.content_sha256`: checked whenever it is read."""


@dataclass(frozen=True)
class Split:
    """The shards of a split, such as "train", in order."""

    num_rows: Count
    fingerprint: str
    """Hash of the image shape, the encoding, the classes, and the shards' row groups and checksums."""
    shards: tuple[Shard, ...]

    @cached_property
    def row_group_ends(self) -> list[int]:
        """Row groups up to the end of each shard."""
        return list(itertools.accumulate(len(shard.row_groups) for shard in self.shards))


@dataclass(frozen=True)
class _Header:
    format: str


@dataclass(frozen=True)
class Manifest:
    """The description of a data set."""

    source: str
    """Name of its source: "digits"."""
    options: str
    """Hash of everything requested from `prepare`; equal hashes mean equal data."""
    height: Side
    width: Side
    channels: Annotated[int, Interval(ge=1, le=3)]
    encoding: Encoding
    class_names: tuple[str, ...]
    """Empty: no labels."""
    splits: dict[str, Split]
    fingerprint: str
    """Hash of all fields."""
    format: Literal["ddpm-shards/2"] = FORMAT


def make_manifest(
    source: str,
    height: int,
    width: int,
    channels: int,
    encoding: Encoding,
    class_names: Sequence[str],
    shards: Mapping[str, Sequence[Shard]],
    options: str,
) -> Manifest:
    """The manifest of shards that have been written; fingerprints are computed here."""
    shape = [height, width, channels, encoding, list(class_names)]
    splits = {}
    for name, parts in sorted(shards.items()):
        content = [[shard.sha256, shard.row_groups, shard.row_group_sha256] for shard in parts]
        splits[name] = Split(sum(s.num_rows for s in parts), _digest([shape, content]), tuple(parts))
    whole = _digest([[name, split.fingerprint] for name, split in splits.items()])
    return Manifest(source, options, height, width, channels, encoding, tuple(class_names), splits, whole)


def write_manifest(location: Location, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all; from then on the data set exists."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    location.child(MANIFEST).write(text.encode(), durable=True)


def read_manifest(location: Location, timeout_s: float = 0.0) -> Manifest:
    """The manifest of the data set at `location`.

    Args:
        timeout_s: how long storage may fail (run.storage_timeout_s).

    Raises:
        UserError: the manifest is missing, or does not describe a data set.
        StorageError: storage has failed for longer than timeout_s.
    """

    file = location.child(MANIFEST)

    def read() -> bytes:
        with file.filesystem.open_input_stream(file.path) as stream:
            return stream.read(MAX_MANIFEST_BYTES + 1)

    try:
        text = retry_io(read, where=file.uri, timeout_s=timeout_s)
    except FileNotFoundError:
        raise UserError(f"no data set at {location.uri}: it has no {MANIFEST}{_advice(location)}") from None
    if len(text) > MAX_MANIFEST_BYTES:
        raise UserError(
            f"{file.uri} is larger than {MAX_MANIFEST_BYTES >> 20} MiB; a data set of that size needs larger "
            "row groups (rows_per_row_group of ddpm.data.prepare.prepare)"
        )
    return manifest_from_json(text, file.uri)


def manifest_from_json(text: str | bytes, where: str) -> Manifest:
    """The manifest that `text` describes, every field checked.

    Raises:
        UserError: `text` is not a valid manifest; `where` names the file.
    """
    header = strict_json.parse(_Header, text, where, extra="ignore")
    if header.format != FORMAT:
        raise UserError(
            f"{where}: format is {header.format!r}; this version reads {FORMAT!r}: prepare the data set again, "
            "at another place or after removing this one"
        )
    read = strict_json.parse(Manifest, text, where)
    for name, split in read.splits.items():
        for shard in split.shards:
            _check_shard(shard, where, name)
        if len({shard.path for shard in split.shards}) != len(split.shards):
            raise UserError(f"{where}: split {name!r} names a shard twice")
        if sum(shard.num_rows for shard in split.shards) != split.num_rows:
            raise UserError(
                f"{where}: split {name!r} lists {split.num_rows} rows, but its shards hold another number"
            )
    if not read.splits:
        raise UserError(f"{where}: there are no splits")
    if read.channels == 2:
        raise UserError(f"{where}: channels is 2; it must be 1 (grey) or 3 (RGB)")
    most = max(rows for split in read.splits.values() for shard in split.shards for rows in shard.row_groups)
    if most * read.height * read.width * read.channels > MAX_ROW_GROUP_BYTES:
        raise UserError(
            f"{where}: a row group holds {most} images of {read.height}x{read.width}, which take more than "
            f"{MAX_ROW_GROUP_BYTES >> 30} GiB; prepare it again with smaller row groups"
        )
    shape = read.height, read.width, read.channels, read.encoding, read.class_names
    shards = {name: split.shards for name, split in read.splits.items()}
    manifest = make_manifest(read.source, *shape, shards, read.options)
    if read != manifest:
        raise UserError(f"{where}: a fingerprint does not match its shards; the file was altered")
    return manifest


def shard_to_json(shard: Shard) -> str:
    """The input of `shard_from_json`."""
    return json.dumps(dataclasses.asdict(shard))


def shard_from_json(text: str | bytes, where: str) -> Shard:
    """The shard that `text` describes, every field checked.

    Raises:
        UserError: `text` is not a valid shard; `where` names the file.
    """
    shard = strict_json.parse(Shard, text, where)
    _check_shard(shard, where)
    return shard


def _check_shard(shard: Shard, where: str, split: str | None = None) -> None:
    """Raise UserError if the shard is inconsistent, or is not in the folder `split`."""
    path, groups, sums = shard.path, shard.row_groups, shard.row_group_sha256
    named = re.fullmatch(r"([A-Za-z0-9_-]+)/[0-9]{5,9}\.parquet", path)
    if named is None or named[1] != (split or named[1]):
        raise UserError(f"{where}: shard path {path!r} is not of the form {split or 'SPLIT'}/00000.parquet")
    if odd := [value for value in (shard.sha256, *sums) if not re.fullmatch("[0-9a-f]{64}", value)]:
        raise UserError(f"{where}: a sha256 of shard {path} is {odd[0]!r:.80}; it must be 64 hex digits")
    if sum(groups) != shard.num_rows:
        raise UserError(
            f"{where}: shard {path} lists {shard.num_rows} rows, but its row groups hold another number"
        )
    if len(sums) != len(groups):
        raise UserError(f"{where}: shard {path} has {len(groups)} row groups, but {len(sums)} checksums")


def _advice(location: Location) -> str:
    """Advice for an error message: how to make a data set, never in a folder of images."""
    where = location.uri
    if not _holds_pictures(location):
        return f"; make one with `python jobs/prepare.py SOURCE {where}`"
    if not location.is_local:
        return ", but images; download them, and make a data set of the folder with `python jobs/prepare.py folder`"
    pictures, shards = shlex.quote(where), shlex.quote(f"{where.rstrip('/')}-shards")
    return (
        f", but images; make a data set of them with `python jobs/prepare.py folder {shards} --path {pictures} "
        f"--size N`, where N is --model.image-size or a multiple of it, and give it as --data.shards {shards}"
    )


def _holds_pictures(location: Location) -> bool:
    """Whether a file has an image suffix; in a bucket only the folder and its first subfolder are listed."""
    if location.is_local:
        names = [name for _, _, files in os.walk(location.path) for name in files]
    else:
        names = []
        with contextlib.suppress(OSError):  # listing needs its own permission
            names = location.files()
            for folder in location.folders()[:1]:
                names += location.child(folder).files()
    return any(name.lower().endswith(PICTURES) for name in names)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
