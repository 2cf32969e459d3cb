"""The four IDX files of MNIST and of Fashion-MNIST.

Axes: N images, H W, C channels.
"""

import gzip
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm.utils.errors import UserError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
FILES = {"train": "train", "test": "t10k"}


def missing_idx(folder: Path) -> str | None:
    """The first of MNIST's four files that is not in `folder`, neither plain nor as .gz."""
    names = [f"{prefix}-{kind}-ubyte" for prefix in FILES.values() for kind in ("images-idx3", "labels-idx1")]
    return next((n for n in names if not (folder / n).exists() and not (folder / f"{n}.gz").exists()), None)


def read_idx_folder(folder: Path) -> dict[str, tuple[Pixels, Labels]]:
    """MNIST's four files: images uint8 [N, 28, 28, 1] and labels int64 [N] of "train" and "test".

    Raises:
        UserError: a file is damaged, or images and labels do not match.
    """
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

    Raises:
        UserError: `path` is not such a file.
    """
    try:
        data = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if len(data) >= 4 and data[:3] == b"\0\0\x08" and len(data) >= 4 + 4 * data[3]:
        shape = tuple(np.frombuffer(data, ">u4", count=data[3], offset=4).tolist())
        if len(data) == 4 + 4 * len(shape) + math.prod(shape):
            return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    raise UserError(f"{path} is not a complete IDX file of unsigned bytes")
