"""The data set on storage: Parquet shards beside the manifest that says what they hold.

    manifest.json             image shape, encoding, classes, rows of every row group, checksums; written last
    train/00000.parquet ...   columns image (bytes) and label (int64; absent without classes)

A folder without manifest.json is not a data set. An image is either raw, H*W*C uint8 in row-major [H, W, C]
order, or encoded, the bytes of a PNG, JPEG or WebP of the manifest's size. Row groups are the unit of reading:
all of a shard are equal, but for the last. Pages carry a checksum, so a damaged pixel is found when it is read.

Axes: N images, H W, C channels.
"""

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ddpm.config import UserError

# The data set's parts are known by this module's name; where they are checked is its own affair.
from ddpm.data.manifest import Manifest as Manifest
from ddpm.data.manifest import Shard as Shard
from ddpm.data.manifest import Split as Split
from ddpm.data.manifest import make_manifest as make_manifest
from ddpm.data.manifest import read_manifest as read_manifest
from ddpm.data.manifest import write_manifest as write_manifest
from ddpm.data.manifest import write_whole

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
COPY_BYTES = 1 << 20


class CorruptData(UserError):
    """A shard cannot be read, or holds what its manifest does not say."""


def write_shard(
    filesystem: pafs.FileSystem,
    root: str,
    path: str,
    images: Pixels | Sequence[bytes],
    labels: Labels | None,
    *,
    rows_per_row_group: int,
) -> Shard:
    """Write one shard; the same images give the same bytes (of one version of pyarrow).

    Args:
        path: below `root`: "train/00000.parquet".
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
    file = io.BytesIO()
    # Pixels hardly compress and must be read fast; an encoded image is compressed already.
    pq.write_table(
        pa.table(columns),
        file,
        row_group_size=rows_per_row_group,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    data = file.getvalue()
    write_whole(filesystem, f"{root}/{path}", data)
    n = len(images)
    row_groups = tuple(min(rows_per_row_group, n - i) for i in range(0, n, rows_per_row_group))
    return Shard(path, n, row_groups, len(data), hashlib.sha256(data).hexdigest())


def is_intact(filesystem: pafs.FileSystem, root: str, shard: Shard) -> bool:
    """Whether the shard's file is there with the bytes it was written with; reads all of it.

    Raises:
        OSError: storage does not answer.
    """
    digest = hashlib.sha256()
    try:
        with filesystem.open_input_stream(f"{root}/{shard.path}") as stream:
            while data := stream.read(COPY_BYTES):
                digest.update(data)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == shard.sha256


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
        uint8 [N, H, W, C] (raw images are a view of what was read), and int64 [N] or None.

    Raises:
        CorruptData: naming shard, row group and row.
        OSError: storage does not answer.
    """
    shard, inside = _locate(manifest.splits[split], index)
    where = f"{root}/{shard.path}, row group {inside}"
    table = _read(filesystem, root, shard, inside, where)
    labels = _labels(table, len(manifest.class_names), where) if manifest.class_names else None
    if labels is not None and rows is not None:
        labels = labels[rows]
    if "image" not in table.column_names:
        raise CorruptData(f"{where} has no column image; it has {', '.join(table.column_names)}")
    column = table.column("image").combine_chunks()
    if manifest.encoding == "raw":
        pixels = _raw(column, manifest, where)
        return (pixels if rows is None else pixels[rows]), labels
    wanted = np.arange(table.num_rows) if rows is None else rows
    shape = (manifest.height, manifest.width, manifest.channels)
    decoded = np.empty((len(wanted), *shape), np.uint8)
    for i, row in enumerate(wanted.tolist()):
        try:
            decoded[i] = decode(column[row].as_py(), *shape)
        except ValueError as error:
            raise CorruptData(f"{where}, row {row}: {error}") from None
    return decoded, labels


def decode(data: bytes, height: int, width: int, channels: int) -> Pixels:
    """An encoded image as uint8 [H, W, C].

    Raises:
        ValueError: it is no PNG, JPEG or WebP, or has another size (known from its header, before any pixel
            is decoded: a small file can claim a picture that fills the memory).
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.size == (width, height):
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.uint8)
                return pixels.reshape(height, width, channels)
            found = image.size
    except Exception as error:  # Pillow raises a dozen types for damaged files, warnings of size among them
        raise ValueError(f"the image cannot be decoded: {error}") from None
    raise ValueError(f"the image is {found[1]}x{found[0]}; the manifest says {height}x{width}")


def _locate(split: Split, index: int) -> tuple[Shard, int]:
    for shard in split.shards:
        if index < len(shard.row_groups):
            return shard, index
        index -= len(shard.row_groups)
    raise IndexError(f"row group {index} is past the end of the split")


def _read(filesystem: pafs.FileSystem, root: str, shard: Shard, inside: int, where: str) -> pa.Table:
    try:
        with filesystem.open_input_file(f"{root}/{shard.path}") as file:
            parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
            table = parquet.read_row_group(inside, use_threads=False)
    except FileNotFoundError:
        raise CorruptData(f"{root}/{shard.path} is missing; the manifest names it") from None
    except (OSError, pa.ArrowException, IndexError) as error:
        # Arrow says OSError for a damaged file too. The checksum tells it from storage that does not answer:
        # that raises OSError here again, or has recovered meanwhile.
        if isinstance(error, OSError) and is_intact(filesystem, root, shard):
            raise
        raise CorruptData(f"{where} cannot be read: {error}") from None
    if table.num_rows != shard.row_groups[inside]:
        raise CorruptData(f"{where} has {table.num_rows} rows; the manifest says {shard.row_groups[inside]}")
    return table


def _raw(column: pa.Array, manifest: Manifest, where: str) -> Pixels:
    size = manifest.height * manifest.width * manifest.channels
    if column.type != pa.binary(size) or column.null_count:
        raise CorruptData(
            f"{where}: image is {column.type}; raw images of the manifest's size are {pa.binary(size)}"
        )
    buffer = column.buffers()[1]
    assert buffer is not None
    pixels = np.frombuffer(
        memoryview(buffer), np.uint8, count=len(column) * size, offset=column.offset * size
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
