"""What a data set is, in one file: manifest.json, written last.

A manifest comes from outside: every
field is checked before it is used, nothing in it can name a file out of the data set's folder, and its
fingerprints are computed again, so that what a run recorded as its data is what it read.
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
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow.fs as pafs

from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

MANIFEST = "manifest.json"
FORMAT = "ddpm-shards/2"
MAX_SIDE = 16_384
MAX_COUNT = 10**12
MAX_ROW_GROUP_BYTES = 1 << 31
"""Largest row group when decoded, which one task holds in memory; `prepare` makes them of about 4 MB."""
MAX_MANIFEST_BYTES = 256 << 20
"""That is 2.6 million row groups; reading them takes 5 times as much memory."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Encoding = Literal["raw", "encoded"]


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    path: str
    """Below the data set's folder: "train/00000.parquet"."""
    num_rows: int
    row_groups: tuple[int, ...]
    """Rows of every row group, in order."""
    num_bytes: int
    sha256: str
    """SHA-256 of the file."""
    row_group_sha256: tuple[str, ...]
    """SHA-256 of the content of every row group, `shards.content_sha256`: checked whenever it is read."""


@dataclass(frozen=True)
class Split:
    """The shards of "train", say, in order."""

    num_rows: int
    fingerprint: str
    """Hash of the image shape, the encoding, the classes, and the shards' row groups and checksums."""
    shards: tuple[Shard, ...]

    @cached_property
    def row_group_ends(self) -> list[int]:
        """Row groups up to the end of each shard."""
        return list(itertools.accumulate(len(shard.row_groups) for shard in self.shards))


@dataclass(frozen=True)
class Manifest:
    """What a data set is."""

    source: str
    """Where it came from: "digits"."""
    options: str
    """Hash of all that `prepare` was asked for: the same means the same data."""
    height: int
    width: int
    channels: int
    encoding: Encoding
    class_names: tuple[str, ...]
    """Empty: no labels."""
    splits: dict[str, Split]
    fingerprint: str
    """Hash of all fields."""
    format: str = FORMAT


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


def write_manifest(filesystem: pafs.FileSystem, root: str, manifest: Manifest) -> None:
    """Make the data set exist. The file appears whole or not at all."""
    write_whole(
        filesystem, f"{root}/{MANIFEST}", (json.dumps(dataclasses.asdict(manifest), indent=1) + "\n").encode()
    )


def write_whole(filesystem: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write a file that appears whole or not at all: by a rename on disk, by one upload on an object store."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        files.write_whole(Path(path), data)
        return
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(path) as stream:  # the object is there when its upload is complete
        stream.write(data)


def read_manifest(filesystem: pafs.FileSystem, root: str, where: str, timeout_s: float = 0.0) -> Manifest:
    """The manifest of the data set at `root`.

    Args:
        where: what to call the data set in errors, its URI.
        timeout_s: how long storage may fail (run.storage_timeout_s).

    Raises:
        UserError: there is none, or it does not describe a data set.
        StorageError: storage has failed for longer.
    """

    def read() -> bytes:
        with filesystem.open_input_stream(f"{root}/{MANIFEST}") as stream:
            return stream.read(MAX_MANIFEST_BYTES + 1)

    try:
        text = retry_io(read, where=f"{where}/{MANIFEST}", timeout_s=timeout_s)
    except FileNotFoundError:
        raise UserError(
            f"no data set at {where}: it has no {MANIFEST}{_advice(filesystem, root, where)}"
        ) from None
    if len(text) > MAX_MANIFEST_BYTES:
        raise UserError(
            f"{where}/{MANIFEST} is larger than {MAX_MANIFEST_BYTES >> 20} MiB; a data set of that size takes larger "
            "row groups (rows_per_row_group of ddpm.data.prepare.prepare)"
        )
    return manifest_from_json(text, f"{where}/{MANIFEST}")


def manifest_from_json(text: str | bytes, where: str) -> Manifest:
    """The manifest that `text` describes, every field checked.

    Raises:
        UserError: it is no manifest; `where` names the file.
    """
    reader = _Reader(where)
    parsed = reader.mapping(_parse(text, where), "the manifest")
    if "format" in parsed and parsed["format"] != FORMAT:
        raise UserError(
            f"{where}: format is {parsed['format']!r}; this version reads {FORMAT!r}: prepare the data set again, "
            "at another place or after removing this one"
        )
    raw = reader.fields(parsed, Manifest, "the manifest")
    if raw["encoding"] not in get_args(Encoding):
        raise UserError(f"{where}: encoding is {raw['encoding']!r}; it must be raw or encoded")
    shards = {}
    for name, value in reader.mapping(raw["splits"], "splits").items():
        split = reader.fields(value, Split, f"split {name!r}")
        shards[name] = [reader.shard(shard, name) for shard in reader.list(split["shards"], "shards")]
        if len({shard.path for shard in shards[name]}) != len(shards[name]):
            raise UserError(f"{where}: split {name!r} names a shard twice")
        rows = reader.count(split["num_rows"], f"num_rows of {name!r}")
        if sum(shard.num_rows for shard in shards[name]) != rows:
            raise UserError(f"{where}: split {name!r} says {rows} rows, its shards hold others")
    if not shards:
        raise UserError(f"{where}: there are no splits")
    manifest = make_manifest(
        source=reader.text(raw["source"], "source"),
        height=reader.count(raw["height"], "height", MAX_SIDE),
        width=reader.count(raw["width"], "width", MAX_SIDE),
        channels=reader.count(raw["channels"], "channels", 3),
        encoding=raw["encoding"],
        class_names=[reader.text(c, "class name") for c in reader.list(raw["class_names"], "class_names")],
        shards=shards,
        options=reader.text(raw["options"], "options"),
    )
    if manifest.channels == 2:
        raise UserError(f"{where}: channels is 2; it must be 1 (grey) or 3 (RGB)")
    most = max(
        rows for split in manifest.splits.values() for shard in split.shards for rows in shard.row_groups
    )
    if most * manifest.height * manifest.width * manifest.channels > MAX_ROW_GROUP_BYTES:
        raise UserError(
            f"{where}: a row group holds {most} images of {manifest.height}x{manifest.width}, which are more than "
            f"{MAX_ROW_GROUP_BYTES >> 30} GiB; prepare it again with smaller row groups"
        )
    recorded = {name: split["fingerprint"] for name, split in raw["splits"].items()}
    if raw["fingerprint"] != manifest.fingerprint or any(
        recorded[name] != split.fingerprint for name, split in manifest.splits.items()
    ):
        raise UserError(f"{where}: a fingerprint is not that of its shards; the file was altered")
    return manifest


def shard_to_json(shard: Shard) -> str:
    """What `shard_from_json` reads."""
    return json.dumps(dataclasses.asdict(shard))


def shard_from_json(text: str | bytes, where: str) -> Shard:
    """The shard that `text` describes, every field checked.

    Raises:
        UserError: it is none; `where` names the file.
    """
    return _Reader(where).shard(_parse(text, where))


def _advice(filesystem: pafs.FileSystem, root: str, where: str) -> str:
    """How to make a data set, which never goes into a folder of pictures."""
    if not _holds_pictures(filesystem, root):
        return f"; make one with `python jobs/prepare.py SOURCE {where}`"
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return ", but pictures; download them, and make a data set of the folder with `python jobs/prepare.py folder`"
    pictures, shards = shlex.quote(where), shlex.quote(f"{where.rstrip('/')}-shards")
    return (
        f", but pictures; make one of them beside it with `python jobs/prepare.py folder {shards} --path {pictures} "
        f"--size N`, N being --model.image-size or a multiple of it, and give it as --data.shards {shards}"
    )


def _holds_pictures(filesystem: pafs.FileSystem, root: str) -> bool:
    """Whether a file in there has a picture's name; in a bucket the folder and the first one in it are listed."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        names = [name for _, _, files in os.walk(root) for name in files]
    else:
        found: list[pafs.FileInfo] = []
        with contextlib.suppress(OSError):  # to be listed needs a right of its own
            found = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
            for folder in [info.path for info in found if info.type == pafs.FileType.Directory][:1]:
                found += filesystem.get_file_info(pafs.FileSelector(folder))
        names = [info.base_name for info in found]
    return any(name.lower().endswith(PICTURES) for name in names)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None


class _Reader:
    """Checks of JSON from outside; every complaint names the file."""

    def __init__(self, where: str) -> None:
        self._where = where

    def fields(self, value: Any, cls: type, what: str) -> dict[str, Any]:
        raw = self.mapping(value, what)
        want = {f.name for f in dataclasses.fields(cls)}
        if odd := sorted(want ^ set(raw)):
            has = "has the unknown key" if odd[0] in raw else "lacks"
            raise UserError(f"{self._where}: {what} {has} {odd[0]!r}")
        return raw

    def mapping(self, value: Any, what: str) -> dict[str, Any]:
        return self._of(dict, value, what)

    def list(self, value: Any, what: str) -> list[Any]:
        return self._of(list, value, what)

    def text(self, value: Any, what: str) -> str:
        return self._of(str, value, what)

    def sha256(self, value: Any, what: str) -> str:
        if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
            return value
        raise UserError(f"{self._where}: {what} is {value!r}; it must be 64 hex digits")

    def count(self, value: Any, what: str, most: int = MAX_COUNT) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
            return value
        raise UserError(f"{self._where}: {what} is {value!r}; it must be a whole number in 1..{most}")

    def shard(self, value: Any, split: str | None = None) -> Shard:
        """The shard that `value` describes; it must lie in the folder `split`, if one is given."""
        raw = self.fields(value, Shard, "a shard")
        path = self.text(raw["path"], "path")
        named = re.fullmatch(r"([A-Za-z0-9_-]+)/[0-9]{5,9}\.parquet", path)
        if named is None or named[1] != (split or named[1]):
            raise UserError(
                f"{self._where}: shard path {path!r} is not of the form {split or 'SPLIT'}/00000.parquet"
            )
        sha256 = self.sha256(raw["sha256"], f"sha256 of shard {path}")
        sums = [
            self.sha256(value, f"a row_group_sha256 of shard {path}")
            for value in self.list(raw["row_group_sha256"], "row_group_sha256")
        ]
        groups = [self.count(n, "rows of a row group") for n in self.list(raw["row_groups"], "row_groups")]
        rows = self.count(raw["num_rows"], "num_rows")
        if sum(groups) != rows:
            raise UserError(f"{self._where}: shard {path} says {rows} rows, its row groups hold others")
        if len(sums) != len(groups):
            raise UserError(
                f"{self._where}: shard {path} has {len(groups)} row groups, and checksums of {len(sums)}"
            )
        num_bytes = self.count(raw["num_bytes"], "num_bytes")
        return Shard(path, rows, tuple(groups), num_bytes, sha256, tuple(sums))

    def _of(self, kind: type, value: Any, what: str) -> Any:
        if isinstance(value, kind):
            return value
        raise UserError(f"{self._where}: {what} is {type(value).__name__}; it must be {kind.__name__}")
