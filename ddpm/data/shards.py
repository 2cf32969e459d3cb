"""The data set on storage: Parquet shards and the manifest that describes them.

    manifest.json             image shape, encoding, classes, rows of every row group, checksums; written last
    train/00000.parquet ...   columns image (bytes) and label (int64; absent without classes)

A folder without manifest.json is not a data set. An image is either raw, H*W*C uint8 in row-major [H, W, C]
order, or encoded, the bytes of a PNG, JPEG or WebP of the manifest's size. Row groups are the unit of reading:
all of a shard have equal size, except the last, and each is checked against its checksum at every read.

Axes: N images, H W, C channels.
"""

import bisect
import contextlib
import hashlib
import io
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ddpm.data.manifest import Manifest, Shard, Split
from ddpm.data.row_group import CorruptData, Labels, Pixels, RowGroup, columns, content_sha256
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError
from ddpm.utils.retry import error_line

COPY_BYTES = 1 << 20
MAX_SHARD_BYTES = 1 << 30
"""Largest shard of an earlier call that is kept: it is read whole."""
DAMAGE = (OSError, pa.ArrowException, IndexError, UnicodeDecodeError)
"""Errors of pyarrow for a damaged file."""
_AGAIN = "remove the data set, and run the command that prepared it again: it writes the same bytes"


def write_shard(
    location: Location,
    path: str,
    images: Pixels | Sequence[bytes] | pa.Array,
    labels: Labels | None,
    *,
    rows_per_row_group: int,
) -> Shard:
    """Write one shard; the same images give the same bytes (with the same version of pyarrow).

    Args:
        path: below the data set's folder: "train/00000.parquet".
        images: uint8 [N, H, W, C], stored raw, or N encoded images; or the column of another shard.
        labels: int64 [N].
    """
    if isinstance(images, np.ndarray):
        size = int(np.prod(images.shape[1:]))
        buffer = pa.py_buffer(np.ascontiguousarray(images).data)
        column: pa.Array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(images), [None, buffer])
    elif isinstance(images, pa.Array):
        column = images
    else:
        column = pa.array(list(images), pa.binary())
    content = {"image": column}
    if labels is not None:
        content["label"] = pa.array(labels, pa.int64())
    file = io.BytesIO()
    pq.write_table(
        pa.table(content),
        file,
        row_group_size=rows_per_row_group,
        # Pixels hardly compress and must be read fast; an encoded image is compressed already.
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    data = file.getvalue()
    location.child(path).write(data, durable=True)
    return _described(path, data)


def kept_shard(location: Location, path: str, num_rows: int) -> Shard | None:
    """The shard `path` of an earlier call, if it is there, whole and of `num_rows` rows; reads all of it.

    Its pages have checksums, so damage since it was written is detected.
    """
    try:
        data = location.child(path).read(MAX_SHARD_BYTES)
    except (FileNotFoundError, UserError):  # UserError: it is larger
        return None
    with contextlib.suppress(CorruptData, KeyError, *DAMAGE):
        shard = _described(path, data)
        return shard if shard.num_rows == num_rows else None
    return None


def _described(path: str, data: bytes) -> Shard:
    """The manifest's entry of a shard whose file has the content `data`."""
    parquet = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    row_groups = [columns(parquet.read_row_group(i)) for i in range(parquet.num_row_groups)]
    sizes = tuple(len(image) for image, _ in row_groups)
    return Shard(
        path=path,
        num_rows=sum(sizes),
        row_groups=sizes,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        row_group_sha256=tuple(content_sha256(image, label) for image, label in row_groups),
    )


def is_intact(location: Location, shard: Shard) -> bool:
    """Whether the shard's file is there with the bytes it was written with; reads all of it."""
    digest = hashlib.sha256()
    try:
        with location.filesystem.open_input_stream(location.child(shard.path).path) as stream:
            while data := stream.read(COPY_BYTES):
                digest.update(data)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == shard.sha256


def read_row_group(
    location: Location, manifest: Manifest, split: str, index: int, rows: NDArray[np.int64] | None = None
) -> tuple[Pixels, Labels | None]:
    """The images of one row group, decoded, and their labels; see `open_row_group` and `RowGroup.rows`."""
    return open_row_group(location, manifest, split, index).rows(rows)


def open_row_group(location: Location, manifest: Manifest, split: str, index: int) -> RowGroup:
    """Read row group `index`, counted over the shards of the split in order, and verify its checksum.

    Raises:
        CorruptData: it cannot be read; the message names shard and row group, and says how to make them again.
        OSError: storage does not answer.
    """
    shard, inside = locate(manifest.splits[split], index)
    where = f"{location.child(shard.path).uri}, row group {inside}"
    try:
        image, label = columns(_read(location, manifest, shard, inside))
        if content_sha256(image, label) != shard.row_group_sha256[inside]:
            raise CorruptData("its checksum is not that of the manifest")
    except CorruptData as error:
        raise CorruptData(f"{where}: {error}; {_AGAIN}") from None
    return RowGroup(where, image, label, manifest)


def locate(split: Split, index: int) -> tuple[Shard, int]:
    """The shard of row group `index` of the split, and its number inside the shard."""
    number = bisect.bisect_right(split.row_group_ends, index)
    if number == len(split.shards):
        raise IndexError(f"row group {index} is past the end of the split")
    shard = split.shards[number]
    return shard, index - (split.row_group_ends[number] - len(shard.row_groups))


def _read(location: Location, manifest: Manifest, shard: Shard, inside: int) -> pa.Table:
    try:
        with location.filesystem.open_input_file(location.child(shard.path).path) as file:
            if file.size() != shard.num_bytes:
                raise CorruptData(f"the shard has {file.size()} bytes; the manifest says {shard.num_bytes}")
            parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
            return _row_group(parquet, manifest, shard, inside)
    except FileNotFoundError:
        raise CorruptData("the shard is missing; the manifest names it") from None
    except DAMAGE as error:
        # Arrow raises OSError for a damaged file too. The checksum distinguishes it from failing storage,
        # which raises OSError here again, or has recovered meanwhile.
        if isinstance(error, OSError) and is_intact(location, shard):
            raise
        raise CorruptData(f"it cannot be read: {error_line(error)}") from None


def _row_group(parquet: pq.ParquetFile, manifest: Manifest, shard: Shard, inside: int) -> pa.Table:
    """The columns of a row group that the manifest describes."""
    num_rows = parquet.metadata.row_group(inside).num_rows
    if num_rows != shard.row_groups[inside]:
        raise CorruptData(f"it has {num_rows} rows; the manifest says {shard.row_groups[inside]}")
    size = math.prod(manifest.shape) if manifest.encoding == "raw" else -1  # -1: of any size
    types: dict[str, pa.DataType] = {"image": pa.binary(size)}
    if manifest.class_names:
        types["label"] = pa.int64()
    schema = parquet.schema_arrow
    for name, kind in types.items():
        stored = schema.field(name).type if name in schema.names else "missing"
        if stored != kind:
            raise CorruptData(f"column {name} is {stored}; the manifest needs {kind}")
    return parquet.read_row_group(inside, columns=list(types), use_threads=False)
