"""The four IDX files of MNIST and of Fashion-MNIST.

Axes: N images, H W, C channels.
"""

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np

from ddpm.data.row_group import Labels, Pixels
from ddpm.utils import files
from ddpm.utils.errors import UserError

FILES = {"train": "train", "test": "t10k"}


def missing_idx(folder: Path) -> str | None:
    """The first of MNIST's four files that is not in `folder`, neither plain nor as .gz."""
    names = [f"{prefix}-{kind}-ubyte" for prefix in FILES.values() for kind in ("images-idx3", "labels-idx1")]
    return next((n for n in names if not (folder / n).exists() and not (folder / f"{n}.gz").exists()), None)


def read_idx_folder(folder: Path) -> dict[str, tuple[Pixels, Labels]]:
    """MNIST's four files: images uint8 [N, 28, 28, 1] and labels int64 [N] of "train" and "test"."""
    splits = {}
    for split, prefix in FILES.items():
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte")
        if images.shape != (len(labels), 28, 28) or labels.ndim != 1 or (len(labels) and labels.max() > 9):
            raise UserError(
                f"{folder}: {prefix} has images {images.shape} and labels {labels.shape}; "
                "they must be [N, 28, 28] and [N], with labels in 0..9"
            )
        splits[split] = (images[..., None], labels.astype(np.int64))
    return splits


def pad(images: Pixels, size: int) -> Pixels:
    """Pad [N, h, w, C] with zeros to [N, size, size, C]; an odd pixel goes to the bottom and right."""
    spare = [size - side for side in images.shape[1:3]]
    return np.pad(images, [(0, 0), *((s // 2, s - s // 2) for s in spare), (0, 0)])


def read_idx(path: Path) -> Pixels:
    """Read an IDX file of unsigned bytes, plain or .gz, in the shape of its header.

    The header: 0, 0, the type (8: unsigned byte), the number of axes; then each axis as a big-endian uint32.
    Source: https://yann.lecun.com/exdb/mnist/
    """
    try:
        if path.exists():
            data = files.read_whole(path)
        else:
            with gzip.GzipFile(fileobj=io.BytesIO(files.read_whole(Path(f"{path}.gz")))) as unpacked:
                data = unpacked.read(files.MAX_BYTES)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if len(data) >= 4 and data[:3] == b"\0\0\x08" and len(data) >= 4 + 4 * data[3]:
        shape = tuple(np.frombuffer(data, ">u4", count=data[3], offset=4).tolist())
        if len(data) == 4 + 4 * len(shape) + math.prod(shape):
            return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    raise UserError(f"{path} is not a complete IDX file of unsigned bytes")
