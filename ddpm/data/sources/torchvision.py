"""Data sets in the files that torchvision downloads: Fashion-MNIST, MNIST, CIFAR-10 and CelebA.

The files are read here, without torchvision: it would execute what the pickles of CIFAR-10 name.

Fashion-MNIST: Xiao et al. 2017, arXiv:1708.07747.
MNIST: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
CIFAR-10: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
CelebA: Liu et al. 2015, arXiv:1411.7766.

Axes: N images, H W, C channels.
"""

import gzip
import hashlib
import io
import pickle
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from ddpm.config.tree import UpTo4096
from ddpm.data.manifest import Encoding
from ddpm.data.row_group import Labels, Pixels
from ddpm.data.sources.conversion import read_file, store
from ddpm.data.sources.file_digests import digest_of_files
from ddpm.data.sources.sources import Loaded, MissingFiles, Square
from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable

Dataset = Literal["cifar10", "mnist", "celeba"]
DATASETS = get_args(Dataset)
MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""Images and labels of each split, perhaps with .gz; Fashion-MNIST has the same names."""
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_FILES = {
    "train": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
}
"""The MD5 that each file was published with."""
CELEBA_PARTITION = "list_eval_partition.txt"
CELEBA_PARTS = {"0": "train", "1": "validation", "2": "test"}
"""Split of each number in it."""


@dataclass(frozen=True)
class FashionMnist(Square, Loaded):
    """70,000 grey images of clothes, from the IDX files of Fashion-MNIST."""

    class_names: ClassVar = FASHION_CLASSES
    path: Path = Path("/usr/share/datasets/fashion-mnist")
    """Folder of train-images-idx3-ubyte.gz and the three others; the default is that of Debian's
    dataset-fashion-mnist."""
    size: Literal[28, 32] = 32
    """32 adds two black pixels on every side, so that a U-Net can halve the image five times; 28 adds none."""
    name: str = field(default="fashion-mnist", init=False)
    channels: int = field(default=1, init=False)
    encoding: Literal["raw"] = field(default="raw", init=False)

    def __post_init__(self) -> None:
        if missing := _missing_mnist_file(self.path):
            raise MissingFiles(
                f"{self.path} has no {missing}[.gz]; install Debian's dataset-fashion-mnist "
                "(apt install dataset-fashion-mnist), or name the folder of the IDX files: --path FOLDER",
                "--path FOLDER",
            )

    def identity(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.size,
            "files": digest_of_files(self.path, _mnist_files(self.path)),
        }

    @cached_property
    def _images(self) -> dict[str, tuple[Pixels, Labels]]:
        return _read_mnist(self.path)


@dataclass(frozen=True)
class Torchvision(Loaded):
    """CIFAR-10, MNIST or CelebA, as torchvision has downloaded it; each has its own splits."""

    dataset: Dataset
    """cifar10: 32x32 RGB, 10 classes. mnist: grey digits, 10 classes. celeba: RGB faces, no labels."""
    root: Path = Path("data")
    """The folder that was given to torchvision as root."""
    size: UpTo4096 | None = None
    """cifar10: 32. mnist: 32, with two black pixels added on every side, or 28. celeba: any, 64 unless given
    (the centre square of 178 pixels, resized)."""
    name: str = field(default="torchvision", init=False)

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:  # as in torchvision:DATASET of a config
            raise UserError(f"dataset is {self.dataset!r}; it must be one of {', '.join(DATASETS)}")
        allowed = {"cifar10": (32,), "mnist": (28, 32)}.get(self.dataset)
        if allowed and self.height not in allowed:
            raise UserError(
                f"--size is {self.size}; for {self.dataset} it must be {' or '.join(map(str, allowed))}"
            )
        _ = self.splits

    @property
    def height(self) -> int:
        if self.size is not None:
            return self.size
        return 64 if self.dataset == "celeba" else 32

    @property
    def channels(self) -> int:
        return 1 if self.dataset == "mnist" else 3

    @property
    def encoding(self) -> Encoding:
        return "encoded" if self.dataset == "celeba" else "raw"

    @property
    def class_names(self) -> tuple[str, ...]:
        if self.dataset == "mnist":
            return tuple("0123456789")
        if self.dataset == "cifar10":
            return CIFAR10_CLASSES
        return ()

    @property
    def splits(self) -> dict[str, int]:
        if self.dataset == "celeba":
            return {split: len(faces) for split, faces in self._faces.items()}
        return super().splits

    def identity(self) -> dict[str, Any]:
        if self.dataset == "mnist":
            paths = _mnist_files(self._folder)
        elif self.dataset == "cifar10":
            paths = [self._folder / name for published in CIFAR10_FILES.values() for name in published]
        else:
            paths = [face for faces in self._faces.values() for face in faces]
            paths.append(self._folder / CELEBA_PARTITION)
        files_digest = digest_of_files(self._folder, paths)
        return {"name": self.name, "dataset": self.dataset, "size": self.height, "files": files_digest}

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels | Sequence[bytes], Labels | None]:
        if self.dataset == "celeba":
            faces = map(read_file, self._faces[split][start:stop])
            return store(faces, self.height, self.channels, self.encoding)
        return super().read(split, start, stop)

    @property
    def _folder(self) -> Path:
        folders = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "celeba": "celeba"}
        return self.root / folders[self.dataset]

    @cached_property
    def _images(self) -> dict[str, tuple[Pixels, Labels]]:
        if self.dataset == "mnist":
            if missing := _missing_mnist_file(self._folder):
                raise self._lacks(f"{missing}[.gz]")
            return _read_mnist(self._folder)
        splits = {}
        for split, published in CIFAR10_FILES.items():
            batches = [self._cifar10_batch(name, md5) for name, md5 in published.items()]
            images, labels = zip(*batches, strict=True)
            splits[split] = (np.concatenate(images), np.concatenate(labels))
        return splits

    def _cifar10_batch(self, name: str, md5: str) -> tuple[Pixels, Labels]:
        path = self._folder / name
        try:
            content = files.read_whole(path)
        except OSError:
            content = b""
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise self._lacks(f"files of CIFAR-10, or has damaged ones ({name})")
        try:
            batch = unpickled(content)
            images = batch["data"].array.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            labels = np.array(batch["labels"], np.int64)
        except Exception as error:  # a pickle may raise any type
            raise UserError(f"{path} is not a batch of CIFAR-10: {printable(str(error))}") from None
        if labels.shape != images.shape[:1] or not ((labels >= 0) & (labels < len(CIFAR10_CLASSES))).all():
            raise UserError(f"{path} is not a batch of CIFAR-10: each image must have a label in 0..9")
        return images, labels

    @cached_property
    def _faces(self) -> dict[str, list[Path]]:
        """CelebA's image files of each split."""
        partition = self._folder / CELEBA_PARTITION
        splits: dict[str, list[Path]] = {split: [] for split in CELEBA_PARTS.values()}
        try:
            for line in files.read_whole(partition).decode().splitlines():
                name, part = line.split()
                splits[CELEBA_PARTS[part]].append(self._folder / "img_align_celeba" / name)
        except FileNotFoundError:
            raise self._lacks(partition.name) from None
        except (OSError, ValueError, KeyError):
            raise UserError(
                f"{partition} is damaged: each line must be a file's name and 0, 1 or 2"
            ) from None
        for faces in splits.values():
            for face in faces:
                if not face.is_file():
                    raise self._lacks(face.relative_to(self._folder).as_posix())
        return {split: faces for split, faces in splits.items() if faces}

    def _lacks(self, what: str) -> UserError:
        name = {"mnist": "MNIST", "cifar10": "CIFAR10", "celeba": "CelebA"}[self.dataset]
        return MissingFiles(
            f"{self._folder} lacks {what}; --root names the folder given to "
            f"torchvision.datasets.{name}(root, download=True), which fetches them",
            f"--dataset {self.dataset} --root FOLDER",
        )


def _mnist_file(folder: Path, name: str) -> Path:
    """The path of one of MNIST's files, plain or as .gz."""
    return folder / name if (folder / name).exists() else folder / f"{name}.gz"


def _mnist_files(folder: Path) -> list[Path]:
    return [_mnist_file(folder, name) for names in MNIST_FILES.values() for name in names]


def _missing_mnist_file(folder: Path) -> str | None:
    """The name of the first of MNIST's four files that is not in `folder`."""
    missing = [path.stem for path in _mnist_files(folder) if not path.exists()]
    return missing[0] if missing else None


def _read_mnist(folder: Path) -> dict[str, tuple[Pixels, Labels]]:
    """MNIST's four files: images uint8 [N, 28, 28, 1] and labels int64 [N] of "train" and "test"."""
    splits = {}
    for split, names in MNIST_FILES.items():
        images, labels = (_read_idx(_mnist_file(folder, name)) for name in names)
        if labels.ndim != 1 or images.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
            raise UserError(
                f"{folder}: {' and '.join(names)} hold arrays {images.shape} and {labels.shape}; they must be "
                "[N, 28, 28] and [N], with labels in 0..9"
            )
        splits[split] = (images[..., None], labels.astype(np.int64))
    return splits


def _read_idx(path: Path) -> Pixels:
    """The array in an IDX file: two zeros, 8 for unsigned bytes, the number of axes, their lengths, the values."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as packed:
                content = packed.read(files.MAX_BYTES + 1)
            files.check_length(len(content), files.MAX_BYTES, str(path))
        else:
            content = files.read_whole(path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        zeros, kind, num_axes = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{num_axes}I", content, 4)
        if (zeros, kind) != (0, 8):
            raise ValueError
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)
    except (struct.error, ValueError):
        raise UserError(f"{path} is not a complete IDX file of unsigned bytes") from None


def unpickled(data: bytes) -> Any:
    """The content of a pickle of numbers, text, bytes, tuples, lists, dicts and uint8 arrays; no other is read.

    An array is a `PickledArray`. Bytes of Python 2, which wrote CIFAR-10, are text (Latin-1).

    Raises:
        pickle.UnpicklingError: the pickle names something else. A damaged one raises other types.
    """
    return _Unpickler(io.BytesIO(data), encoding="latin1").load()


class _PickledType:
    """Stands for `numpy.dtype` in a pickle: "u1"."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """NumPy's byte order and sizes, which the code implies for bytes."""


class PickledArray:
    """Stands for `numpy.ndarray` in a pickle, which makes an empty one, then gives it its state: `array`."""

    def __init__(self, *_: object) -> None:
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _PickledType, bool, str | bytes]) -> None:
        _, shape, kind, is_fortran, content = state
        if kind.code != "u1":
            raise pickle.UnpicklingError(f"an array is of {kind.code}; only u1 is read")
        if isinstance(content, str):
            content = content.encode("latin1")
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Calls nothing but the two classes above, whatever a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        raise pickle.UnpicklingError(
            f"it names {module}.{name}; only arrays, bytes, lists and dicts are read"
        )


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _PickledType,
}
"""What stands for each thing that the pickle of an array names."""
