"""The data set on storage: Parquet shards, and a manifest that says what they hold.

    manifest.json             image shape, encoding, classes, rows of every row group, checksums; written last
    train/00000.parquet ...   columns image (bytes) and label (int64; absent without classes)

A folder without manifest.json is not a data set. An image is either raw, H*W*C uint8 in row-major [H, W, C]
order, or encoded, the bytes of a PNG, JPEG or WebP of the manifest's size. Everything in a manifest comes from
outside and is checked before it is used; nothing in it can name a file out of the folder.

Axes: N images, H W, C channels.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ddpm.config import UserError

MANIFEST = "manifest.json"
FORMAT = "ddpm-shards/1"
MAX_SIDE = 16_384
MAX_ROWS = 10**12
Encoding = Literal["raw", "encoded"]
Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class CorruptData(UserError):
    """A shard cannot be read, or holds what its manifest does not say."""


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


@dataclass(frozen=True)
class Split:
    """The shards of "train", say, in order."""

    num_rows: int
    fingerprint: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What a data set is."""

    source: str
    """Where it came from, in words."""
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
    """Of everything."""
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
    splits = {
        name: Split(sum(s.num_rows for s in parts), _digest([shape, [s.sha256 for s in parts]]), tuple(parts))
        for name, parts in sorted(shards.items())
    }
    whole = _digest([[name, split.fingerprint] for name, split in splits.items()])
    return Manifest(source, options, height, width, channels, encoding, tuple(class_names), splits, whole)


def write_manifest(filesystem: pafs.FileSystem, root: str, manifest: Manifest) -> None:
    """Make the data set exist. The file appears whole or not at all."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    temporary = f"{root}/.{MANIFEST}.tmp" if isinstance(filesystem, pafs.LocalFileSystem) else None
    with filesystem.open_output_stream(temporary or f"{root}/{MANIFEST}") as stream:
        stream.write(text.encode())
    if temporary:  # an object store shows an object only when its upload is complete
        filesystem.move(temporary, f"{root}/{MANIFEST}")


def read_manifest(filesystem: pafs.FileSystem, root: str, where: str) -> Manifest:
    """The manifest of the data set at `root`.

    Args:
        where: what to call the data set in errors, its URI.

    Raises:
        UserError: there is none, or it does not describe a data set.
    """
    try:
        with filesystem.open_input_stream(f"{root}/{MANIFEST}") as stream:
            text = stream.read()
    except FileNotFoundError:
        raise UserError(
            f"no data set at {where}: it has no {MANIFEST}; make one with `python jobs/prepare.py SOURCE {where}`"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {where}/{MANIFEST}: {error}") from None
    return manifest_from_json(text, f"{where}/{MANIFEST}")


def manifest_from_json(text: str | bytes, where: str) -> Manifest:
    """The manifest that `text` describes, every field checked.

    Raises:
        UserError: it is no manifest; `where` names the file.
    """
    reader = _Reader(where)
    raw = reader.fields(_parse(text, where), Manifest, "the manifest")
    if raw["format"] != FORMAT:
        raise UserError(f"{where}: format is {raw['format']!r}; this version reads {FORMAT!r}")
    if raw["encoding"] not in get_args(Encoding):
        raise UserError(f"{where}: encoding is {raw['encoding']!r}; it must be raw or encoded")
    if raw["channels"] not in (1, 3):
        raise UserError(f"{where}: channels is {raw['channels']!r}; it must be 1 or 3")
    splits = {}
    for name, value in reader.mapping(raw["splits"], "splits").items():
        split = reader.fields(value, Split, f"split {name!r}")
        parts = tuple(reader.shard(shard) for shard in reader.list(split["shards"], f"shards of {name!r}"))
        if sum(part.num_rows for part in parts) != split["num_rows"]:
            raise UserError(
                f"{where}: split {name!r} says {split['num_rows']!r} rows, its shards hold others"
            )
        splits[name] = Split(split["num_rows"], reader.text(split["fingerprint"], "fingerprint"), parts)
    return Manifest(
        source=reader.text(raw["source"], "source"),
        options=reader.text(raw["options"], "options"),
        height=reader.count(raw["height"], "height", MAX_SIDE),
        width=reader.count(raw["width"], "width", MAX_SIDE),
        channels=raw["channels"],
        encoding=raw["encoding"],
        class_names=tuple(
            reader.text(c, "class name") for c in reader.list(raw["class_names"], "class_names")
        ),
        splits=splits,
        fingerprint=reader.text(raw["fingerprint"], "fingerprint"),
    )


def shard_to_json(shard: Shard) -> str:
    """What `shard_from_json` reads."""
    return json.dumps(dataclasses.asdict(shard))


def shard_from_json(text: str | bytes, where: str) -> Shard:
    """The shard that `text` describes, every field checked.

    Raises:
        UserError: it is none; `where` names the file.
    """
    return _Reader(where).shard(_parse(text, where))


def write_shard(
    filesystem: pafs.FileSystem,
    root: str,
    path: str,
    images: Pixels | Sequence[bytes],
    labels: Labels | None,
    *,
    rows_per_row_group: int,
) -> Shard:
    """Write one shard; the same images give the same bytes.

    Args:
        path: below `root`: "train/00000.parquet".
        images: uint8 [N, H, W, C], stored raw, or N encoded images.
        labels: int64 [N].
    """
    if isinstance(images, np.ndarray):
        size = int(np.prod(images.shape[1:]))
        buffer = pa.py_buffer(np.ascontiguousarray(images))
        column: pa.Array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(images), [None, buffer])
    else:
        column = pa.array(list(images), pa.binary())
    columns = {"image": column}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    file = io.BytesIO()
    # Pixels hardly compress and must be read fast; an encoded image is compressed already.
    pq.write_table(
        pa.table(columns), file, row_group_size=rows_per_row_group, compression="none", use_dictionary=False
    )
    data = file.getvalue()
    filesystem.create_dir(f"{root}/{path}".rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(f"{root}/{path}") as stream:
        stream.write(data)
    n = len(images)
    row_groups = tuple(min(rows_per_row_group, n - i) for i in range(0, n, rows_per_row_group))
    return Shard(path, n, row_groups, len(data), hashlib.sha256(data).hexdigest())


def read_row_group(
    filesystem: pafs.FileSystem,
    root: str,
    manifest: Manifest,
    split: str,
    index: int,
    rows: NDArray[np.int64] | None = None,
) -> tuple[Pixels, Labels | None]:
    """The images of one row group, decoded, and their labels.

    Args:
        index: of the row group, counted over the shards of the split in order.
        rows: which rows, in this order; None: all.

    Returns:
        uint8 [N, H, W, C] (possibly read-only), and int64 [N] or None.

    Raises:
        CorruptData: naming shard, row group and row.
        OSError: storage does not answer.
    """
    shard, inside = _locate(manifest.splits[split], index)
    where = f"{root}/{shard.path}, row group {inside}"
    try:
        with filesystem.open_input_file(f"{root}/{shard.path}") as file:
            table = pq.ParquetFile(file).read_row_group(inside, use_threads=False)
    except FileNotFoundError:
        raise CorruptData(f"{root}/{shard.path} is missing; the manifest names it") from None
    except (pa.ArrowInvalid, IndexError) as error:
        raise CorruptData(f"{where} cannot be read: {error}") from None
    except OSError as error:
        # Arrow reports a damaged file as OSError too; a store that does not answer is no corruption.
        if filesystem.get_file_info(f"{root}/{shard.path}").size == shard.num_bytes and "Corrupt" not in str(
            error
        ):
            raise
        raise CorruptData(f"{where} cannot be read: {error}") from None
    if table.num_rows != shard.row_groups[inside]:
        raise CorruptData(f"{where} has {table.num_rows} rows; the manifest says {shard.row_groups[inside]}")
    labels = None
    if manifest.class_names:
        labels = _labels(table, len(manifest.class_names), where)
        labels = labels if rows is None else labels[rows]
    wanted = np.arange(table.num_rows) if rows is None else rows
    column = table.column("image").combine_chunks() if "image" in table.column_names else pa.array([])
    if manifest.encoding == "raw":
        pixels = _raw(column, manifest, where)
        return (pixels if rows is None else pixels[rows]), labels
    shape = (manifest.height, manifest.width, manifest.channels)
    decoded = np.empty((len(wanted), *shape), np.uint8)
    for i, row in enumerate(wanted.tolist()):
        try:
            decoded[i] = decode(column[row].as_py(), *shape)
        except (OSError, ValueError, TypeError, IndexError, Image.DecompressionBombError) as error:
            raise CorruptData(f"{where}, row {row}: image cannot be decoded: {error}") from None
    return decoded, labels


def decode(data: bytes, height: int, width: int, channels: int) -> Pixels:
    """An encoded image as uint8 [H, W, C].

    Raises:
        ValueError, OSError: it is no image, or has another size (checked in its header, before any pixel).
    """
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        if image.size != (width, height):
            raise ValueError(f"it is {image.size[1]}x{image.size[0]}, the manifest says {height}x{width}")
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.uint8)
    return pixels.reshape(height, width, channels)


def _locate(split: Split, index: int) -> tuple[Shard, int]:
    for shard in split.shards:
        if index < len(shard.row_groups):
            return shard, index
        index -= len(shard.row_groups)
    raise IndexError(f"row group {index} is past the end of the split")


def _raw(column: pa.Array, manifest: Manifest, where: str) -> Pixels:
    size = manifest.height * manifest.width * manifest.channels
    if column.type != pa.binary(size) or column.null_count:
        raise CorruptData(
            f"{where}: image is {column.type}; raw images of the manifest's size are {pa.binary(size)}"
        )
    pixels = np.frombuffer(
        column.buffers()[1], np.uint8, count=len(column) * size, offset=column.offset * size
    )
    return pixels.reshape(-1, manifest.height, manifest.width, manifest.channels)


def _labels(table: pa.Table, num_classes: int, where: str) -> Labels:
    if "label" not in table.column_names or table.schema.field("label").type != pa.int64():
        raise CorruptData(f"{where} has no int64 column label; the manifest names {num_classes} classes")
    column = table.column("label")
    labels = column.to_numpy()
    if column.null_count or (len(labels) and not (labels.min() >= 0 and labels.max() < num_classes)):
        raise CorruptData(f"{where} has a label that is not in 0..{num_classes - 1}")
    return labels


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

    def count(self, value: Any, what: str, most: int = MAX_ROWS) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
            return value
        raise UserError(f"{self._where}: {what} is {value!r}; it must be a whole number in 1..{most}")

    def shard(self, value: Any) -> Shard:
        raw = self.fields(value, Shard, "a shard")
        path = self.text(raw["path"], "path")
        if not re.fullmatch(r"[A-Za-z0-9_-]+/[A-Za-z0-9_-]+\.parquet", path):
            raise UserError(f"{self._where}: shard path {path!r} is not of the form split/00000.parquet")
        groups = tuple(
            self.count(n, "rows of a row group") for n in self.list(raw["row_groups"], "row_groups")
        )
        if sum(groups) != self.count(raw["num_rows"], "num_rows"):
            raise UserError(
                f"{self._where}: shard {path} says {raw['num_rows']} rows, its row groups hold others"
            )
        size = self.count(raw["num_bytes"], "num_bytes")
        return Shard(path, raw["num_rows"], groups, size, self.text(raw["sha256"], "sha256"))

    def _of(self, kind: type, value: Any, what: str) -> Any:
        if isinstance(value, kind):
            return value
        raise UserError(f"{self._where}: {what} is {type(value).__name__}; it must be {kind.__name__}")
