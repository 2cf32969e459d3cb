"""Published data sets, as arrays: what their files hold, and what is said when a file is missing.

Each is read once a process. Nothing is downloaded.

    digits          Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits" (UCI)
    fashion-mnist   Xiao et al. 2017 (arXiv:1708.07747)
    cifar10         Krizhevsky 2009, "Learning multiple layers of features from tiny images"
    mnist           LeCun et al. 1998
    celeba          Liu et al. 2015 (arXiv:1411.7766)

Axes: N images, H W, C channels.
"""

import gzip
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm.config import UserError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@lru_cache(maxsize=4)
def read_idx(path: Path) -> Pixels:
    """The array in a gzipped IDX file of bytes, the format of MNIST: 0, 0, 8, d, then d sizes, then the data.

    Raises:
        UserError: it is no such file, or too short or too long.
    """
    try:
        with gzip.open(path) as file:
            zeros, kind, dimensions = (int.from_bytes(file.read(n)) for n in (2, 1, 1))
            if (zeros, kind) != (0, 8) or not 1 <= dimensions <= 3:
                raise UserError(f"{path} is not an IDX file of bytes")
            shape = [int.from_bytes(file.read(4)) for _ in range(dimensions)]
            size = math.prod(shape)
            data = file.read(min(size, 2**31) + 1)
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if len(data) != size:
        raise UserError(
            f"{path} says {size} bytes of data, and has {'more' if len(data) > size else len(data)}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def with_border(images: Pixels, size: int) -> Pixels:
    """Grey [N, H, W] or [N, H, W, C] as [N, size, size, C], zeros around it."""
    if images.ndim == 3:
        images = images[..., None]
    spare = size - images.shape[1]
    border = (spare // 2, spare - spare // 2)
    return np.pad(images, ((0, 0), border, border, (0, 0)))


@lru_cache(maxsize=1)
def digits() -> tuple[Pixels, Labels]:
    """uint8 [1797, 8, 8, 1] (0..16 become 0..255), and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)[..., None]
    return images, digits.target.astype(np.int64)


@lru_cache(maxsize=3)
def torchvision_data(dataset: str, path: str, split: str) -> tuple[Pixels | Sequence[str], Labels | None]:
    """Pixels and labels; of CelebA the paths of the files."""
    from torchvision import datasets

    try:
        if dataset == "celeba":
            names = datasets.CelebA(path, split, download=False).filename
            return [f"{path}/celeba/img_align_celeba/{name}" for name in names], None
        # CIFAR-10 is made of pickles: torchvision opens only those with the checksums of the published files.
        loaded = (datasets.CIFAR10 if dataset == "cifar10" else datasets.MNIST)(path, split == "train")
    except (RuntimeError, OSError) as error:
        folder = {"cifar10": "cifar-10-batches-py", "mnist": "MNIST/raw", "celeba": "celeba"}[dataset]
        raise UserError(
            f"torchvision finds no {dataset} under {path} (expected in {path}/{folder}): "
            f"{' '.join(str(error).split())}; name the folder that holds {folder} with --path DIR"
        ) from None
    return np.asarray(loaded.data, np.uint8), np.asarray(loaded.targets, np.int64)
