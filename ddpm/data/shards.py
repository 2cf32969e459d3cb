"""The data set on storage: Parquet shards and the manifest that describes them.

    manifest.json             image shape, encoding, classes, rows of every row group, checksums; written last
    train/00000.parquet ...   columns image (bytes) and label (int64; absent without classes)

A folder without manifest.json is not a data set. An image is either raw, H*W*C uint8 in row-major [H, W, C]
order, or encoded, the bytes of a PNG, JPEG or WebP of the manifest's size. Row groups are the unit of reading:
all of a shard have equal size, except the last, and each is checked against its checksum at every read.

Axes: N images, H W, C channels.
"""

import bisect
import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ddpm.data.corrupt import CorruptData
from ddpm.data.manifest import Manifest, Shard, Split
from ddpm.data.row_group import Labels, Pixels, RowGroup, columns, content_sha256
from ddpm.storage.locations import Location
from ddpm.utils.retry import answer

COPY_BYTES = 1 << 20


def write_shard(
    location: Location,
    path: str,
    images: Pixels | Sequence[bytes],
    labels: Labels | None,
    *,
    rows_per_row_group: int,
) -> Shard:
    """Write one shard; the same images give the same bytes (with the same version of pyarrow).

    Args:
        path: below the data set's folder: "train/00000.parquet".
        images: uint8 [N, H, W, C], stored raw, or N encoded images.
        labels: int64 [N].
    """
    if isinstance(images, np.ndarray):
        size = int(np.prod(images.shape[1:]))
        buffer = pa.py_buffer(np.ascontiguousarray(images).data)
        column: pa.Array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(images), [None, buffer])
    else:
        column = pa.array(list(images), pa.binary())
    columns = {"image": column}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    # Pixels hardly compress and must be read fast; an encoded image is compressed already.
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    file, rows = io.BytesIO(), rows_per_row_group
    pq.write_table(pa.table(columns), file, row_group_size=rows, write_page_checksum=True, **plain)
    data = file.getvalue()
    location.child(path).write(data, durable=True)
    parts = [slice(i, i + rows) for i in range(0, len(images), rows)]
    row_groups = tuple(len(column[part]) for part in parts)
    sums = tuple(content_sha256(column[part], None if labels is None else labels[part]) for part in parts)
    return Shard(path, len(images), row_groups, len(data), hashlib.sha256(data).hexdigest(), sums)


def is_intact(location: Location, shard: Shard) -> bool:
    """Whether the shard's file is there with the bytes it was written with; reads all of it.

    Raises:
        OSError: storage does not answer.
    """
    digest = hashlib.sha256()
    try:
        with location.filesystem.open_input_stream(location.child(shard.path).path) as stream:
            while data := stream.read(COPY_BYTES):
                digest.update(data)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == shard.sha256


def read_row_group(
    location: Location,
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
        uint8 [N, H, W, C] (raw images are a view of what was read), and int64 [N] or None.

    Raises:
        CorruptData: unreadable; the message names shard, row group and row.
        OSError: storage does not answer.
    """
    read = open_row_group(location, manifest, split, index).rows(rows)
    for error in read.unreadable.values():
        raise error
    return read.image, read.label


def open_row_group(location: Location, manifest: Manifest, split: str, index: int) -> RowGroup:
    """Read row group `index`, counted over the shards of the split in order, and verify its checksum.

    Raises:
        CorruptData: no row can be read; the message names shard and row group.
        OSError: storage does not answer.
    """
    shard, inside = locate(manifest.splits[split], index)
    where = f"{location.child(shard.path).uri}, row group {inside}"
    try:
        image, label = columns(_read(location, shard, inside), manifest)
        if content_sha256(image, label) != shard.row_group_sha256[inside]:
            raise CorruptData("its checksum is not that of the manifest")
    except CorruptData as error:
        reason = str(error)
        raise CorruptData(f"{where} (rows 0-{shard.row_groups[inside] - 1}): {reason}", reason) from None
    return RowGroup(where, image, label, manifest)


def locate(split: Split, index: int) -> tuple[Shard, int]:
    """The shard of row group `index` of the split, and its number inside the shard."""
    number = bisect.bisect_right(split.row_group_ends, index)
    if number == len(split.shards):
        raise IndexError(f"row group {index} is past the end of the split")
    shard = split.shards[number]
    return shard, index - (split.row_group_ends[number] - len(shard.row_groups))


def _read(location: Location, shard: Shard, inside: int) -> pa.Table:
    try:
        with location.filesystem.open_input_file(location.child(shard.path).path) as file:
            parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
            _check_size(parquet.metadata.row_group(inside), shard, inside)
            table = parquet.read_row_group(inside, use_threads=False)
    except FileNotFoundError:
        raise CorruptData("the shard is missing; the manifest names it") from None
    except (OSError, pa.ArrowException, IndexError, UnicodeDecodeError) as error:
        # Arrow raises OSError for a damaged file too. The checksum distinguishes it from failing storage,
        # which raises OSError here again, or has recovered meanwhile.
        if isinstance(error, OSError) and is_intact(location, shard):
            raise
        raise CorruptData(f"it cannot be read: {answer(error)}") from None
    return table


def _check_size(group: pq.RowGroupMetaData, shard: Shard, inside: int) -> None:
    """Raise CorruptData if a small file unpacks to more than memory holds; called before unpacking."""
    if group.num_rows != shard.row_groups[inside]:
        raise CorruptData(f"it has {group.num_rows} rows; the manifest says {shard.row_groups[inside]}")
    if group.total_byte_size > shard.num_bytes + COPY_BYTES:
        raise CorruptData(
            f"it unpacks to {group.total_byte_size} bytes; the whole shard has {shard.num_bytes}"
        )
