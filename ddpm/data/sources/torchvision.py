"""Data sets that torchvision reads: Fashion-MNIST, MNIST, CIFAR-10 and CelebA. Nothing is downloaded.

Fashion-MNIST: Xiao et al. 2017, arXiv:1708.07747.
MNIST: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
CIFAR-10: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
CelebA: Liu et al. 2015, arXiv:1411.7766.

Axes: N images, H W, C channels.
"""

import gzip
import tempfile
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
from ddpm.data.sources.image_folder import digest_of_files, read_file, store
from ddpm.data.sources.sources import Loaded, MissingFiles, Square
from ddpm.utils import files
from ddpm.utils.errors import UserError

Dataset = Literal["cifar10", "mnist", "celeba"]
DATASETS = get_args(Dataset)
MNIST_PREFIXES = {"train": "train", "test": "t10k"}
"""How the names of MNIST's files begin, for each split; Fashion-MNIST has the same names."""
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
CELEBA_PARTS = {"0": "train", "1": "validation", "2": "test"}
"""Split of each number in list_eval_partition.txt."""


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
        # The folder of the files does not matter; the sizes of the splits identify them.
        return {"name": self.name, "size": self.size, "splits": self.splits}

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
        identity = {"name": self.name, "dataset": self.dataset, "size": self.height, "splits": self.splits}
        if self.dataset == "celeba":
            faces = [face for part in self._faces.values() for face in part]
            identity["files"] = digest_of_files(self._folder, faces)
        return identity

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
        from torchvision.datasets import CIFAR10

        splits = {}
        for split in ("train", "test"):
            try:
                # These files are pickles: torchvision reads them only if their checksums are the published ones.
                images = CIFAR10(self.root, train=split == "train", download=False)
            except RuntimeError:
                raise self._lacks("files of CIFAR-10, or has damaged ones") from None
            splits[split] = (images.data, np.array(images.targets, np.int64))
        return splits

    @cached_property
    def _faces(self) -> dict[str, list[Path]]:
        """CelebA's image files of each split."""
        partition = self._folder / "list_eval_partition.txt"
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


def _mnist_files(split: str) -> tuple[str, str]:
    """The names of a split's images and labels."""
    prefix = MNIST_PREFIXES[split]
    return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


def _missing_mnist_file(folder: Path) -> str | None:
    """The first of MNIST's four files that is not in `folder`, neither plain nor as .gz."""
    for split in MNIST_PREFIXES:
        for name in _mnist_files(split):
            if not (folder / name).exists() and not (folder / f"{name}.gz").exists():
                return name
    return None


def _read_mnist(folder: Path) -> dict[str, tuple[Pixels, Labels]]:
    """MNIST's four files, plain or as .gz: images uint8 [N, 28, 28, 1] and labels int64 [N] of "train" and "test"."""
    from torchvision.datasets import MNIST  # seconds: it imports PyTorch

    splits = {}
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root, "MNIST", "raw")  # where torchvision looks for plain files
        raw.mkdir(parents=True)
        for split in MNIST_PREFIXES:
            for name in _mnist_files(split):
                (raw / name).write_bytes(_unpacked(folder / name))
        for split in MNIST_PREFIXES:
            try:
                data = MNIST(root, train=split == "train")
            except Exception:  # torchvision asserts, and raises many types
                names = " or ".join(_mnist_files(split))
                raise UserError(f"{folder}: {names} is not a complete IDX file of unsigned bytes") from None
            images = data.data.numpy()
            labels = data.targets.numpy()
            if images.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
                names = " and ".join(_mnist_files(split))
                raise UserError(
                    f"{folder}: {names} hold arrays {images.shape} and {labels.shape}; they must be [N, 28, 28] "
                    "and [N], with labels in 0..9"
                )
            splits[split] = (images[..., None], labels)
    return splits


def _unpacked(path: Path) -> bytes:
    """The content of the file `path`, or else of `path`.gz."""
    try:
        if path.exists():
            return files.read_whole(path)
        with gzip.open(f"{path}.gz") as packed:
            content: bytes = packed.read(files.MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    files.check_length(len(content), files.MAX_BYTES, str(path))
    return content
