"""Where images come from: digits, glyphs, Fashion-MNIST, and what torchvision reads.

A source is a small frozen dataclass. Its fields are its options (and the flags of jobs/prepare.py); making one
costs nothing, nothing is read before it is asked for, and it travels to other processes. Ranges are read
independently of each other. Pictures in folders and Parquet files are in files.py.

Axes: N images, H W, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np

from ddpm.config import UserError
from ddpm.data.pictures import CHARACTERS, fitted, glyph
from ddpm.data.published import (
    CIFAR10_CLASSES,
    Labels,
    Pixels,
    digits,
    read_idx,
    torchvision_data,
    with_border,
)

HELD_OUT_SHARE = 0.05
Encoding = Literal["raw", "encoded"]


class Source(Protocol):
    """Images of one size, in splits, with labels or without."""

    @property
    def name(self) -> str:
        """What it is called: "digits"."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; empty: the images have no labels."""

    @property
    def height(self) -> int:
        """Of every image, in pixels."""

    @property
    def width(self) -> int:
        """Of every image, in pixels."""

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""

    @property
    def encoding(self) -> Encoding:
        """What `read` gives: raw pixels, or image files."""

    @property
    def splits(self) -> dict[str, int]:
        """Images in "train", "test", ..."""

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels | list[bytes], Labels | None]:
        """Images [start, stop) of a split: uint8 [N, H, W, C] if raw, else N files; and int64 [N] or None.

        Raises:
            UserError: what is on disk cannot be read.
        """


def hold_out(num_images: int, seed: int) -> dict[str, Labels]:
    """A shuffle of 0..num_images-1, cut into "train" and "test" (5 %, at least one).

    Raises:
        UserError: fewer than two images.
    """
    if num_images < 2:
        raise UserError(f"there must be at least 2 images, one of them to hold out; there is {num_images}")
    order = np.random.default_rng(seed).permutation(num_images)
    num_test = max(1, round(HELD_OUT_SHARE * num_images))
    return {"train": order[num_test:], "test": order[:num_test]}


@dataclass(frozen=True)
class Digits:
    """1,797 real handwritten digits, 8x8 grey, from scikit-learn. No download."""

    seed: int = 0
    """Which 5 % are held out, and in which order the others are stored."""

    name: ClassVar[str] = "digits"
    class_names: ClassVar[tuple[str, ...]] = tuple("0123456789")
    height: ClassVar[int] = 8
    width: ClassVar[int] = 8
    channels: ClassVar[int] = 1
    encoding: ClassVar[Encoding] = "raw"

    @property
    def splits(self) -> dict[str, int]:
        return _counts(self._rows)

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels, Labels | None]:
        images, labels = digits()
        rows = self._rows[split][start:stop]
        return images[rows], labels[rows]

    @cached_property
    def _rows(self) -> dict[str, Labels]:
        return hold_out(len(digits()[0]), self.seed)


class _Square:
    """Images as high and as wide as the option `size`."""

    size: int

    @property
    def height(self) -> int:
        return self.size

    @property
    def width(self) -> int:
        return self.size


@dataclass(frozen=True)
class Glyphs(_Square):
    """Letters and digits drawn from fonts, a little tilted and out of place. No download."""

    num_images: int = 30_000
    size: int = 32
    coloured: bool = False
    """One colour on another; else white on black."""
    seed: int = 0
    """Image i is a function of this seed and i. Also which 5 % are held out."""

    name: ClassVar[str] = "glyphs"
    class_names: ClassVar[tuple[str, ...]] = tuple(CHARACTERS)
    encoding: ClassVar[Encoding] = "raw"

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 1024:
            raise UserError(f"size is {self.size}; glyphs can be drawn at 8..1024 pixels")

    @property
    def channels(self) -> int:
        return 3 if self.coloured else 1

    @property
    def splits(self) -> dict[str, int]:
        return _counts(self._rows)

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels, Labels | None]:
        rows = self._rows[split][start:stop]
        drawn = [glyph(self.seed, i, self.size, self.coloured) for i in rows.tolist()]
        return np.stack([image for image, _ in drawn]), np.array([label for _, label in drawn], np.int64)

    @cached_property
    def _rows(self) -> dict[str, Labels]:
        return hold_out(self.num_images, self.seed)


@dataclass(frozen=True)
class FashionMnist(_Square):
    """Fashion-MNIST: 60,000 + 10,000 grey images of clothes, from IDX files."""

    path: str = "/usr/share/datasets/fashion-mnist"
    """Folder of the four .gz files, where Debian's package dataset-fashion-mnist puts them."""
    size: int = 32
    """28x28 images get a black border up to this size; 32 halves more often than 28 does."""

    name: ClassVar[str] = "fashion-mnist"
    class_names: ClassVar[tuple[str, ...]] = (
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
    channels: ClassVar[int] = 1
    encoding: ClassVar[Encoding] = "raw"

    def __post_init__(self) -> None:
        _check_border(self.size)

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(self._file(split, "images")) for split in ("train", "test")}

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels, Labels | None]:
        images, labels = self._file(split, "images"), self._file(split, "labels")
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise UserError(
                f"{self.path}: {split} images are {images.shape}, labels {labels.shape}; not Fashion-MNIST"
            )
        return with_border(images[start:stop], self.size), labels[start:stop].astype(np.int64)

    def _file(self, split: str, what: str) -> Pixels:
        prefix, dimensions = {"train": "train", "test": "t10k"}[split], {"images": 3, "labels": 1}[what]
        path = Path(self.path).expanduser() / f"{prefix}-{what}-idx{dimensions}-ubyte.gz"
        if not path.is_file():
            raise UserError(
                f"{path} is missing: install it with `apt-get install dataset-fashion-mnist`, or name the folder "
                "that holds the four .gz files with --path DIR"
            )
        return read_idx(path)


@dataclass(frozen=True)
class Torchvision:
    """CIFAR-10, MNIST or CelebA, from files that torchvision once downloaded."""

    dataset: Literal["cifar10", "mnist", "celeba"]
    path: str = "data"
    """torchvision's `root`."""
    size: int | None = None
    """None: cifar10 32, as it is; mnist 28 with a black border to 32; celeba 64, from the central 140x140."""

    def __post_init__(self) -> None:
        if self.dataset not in ("cifar10", "mnist", "celeba"):
            raise UserError(f"dataset is {self.dataset!r}; it must be cifar10, mnist or celeba")
        if self.dataset == "cifar10" and self.height != 32:
            raise UserError(f"size is {self.size}; cifar10 is 32x32")
        if self.dataset == "mnist":
            _check_border(self.height)
        if self.dataset == "celeba" and not 1 <= self.height <= 1024:
            raise UserError(f"size is {self.size}; celeba can be made 1..1024 pixels large")

    @property
    def name(self) -> str:
        return f"torchvision:{self.dataset}"

    @property
    def class_names(self) -> tuple[str, ...]:
        if self.dataset == "celeba":
            return ()
        return CIFAR10_CLASSES if self.dataset == "cifar10" else tuple("0123456789")

    @property
    def height(self) -> int:
        return self.size if self.size is not None else {"celeba": 64}.get(self.dataset, 32)

    @property
    def width(self) -> int:
        return self.height

    @property
    def channels(self) -> int:
        return 1 if self.dataset == "mnist" else 3

    @property
    def encoding(self) -> Encoding:
        return "encoded" if self.dataset == "celeba" else "raw"

    @property
    def splits(self) -> dict[str, int]:
        names = ("train", "valid", "test") if self.dataset == "celeba" else ("train", "test")
        return {split: len(self._images(split)[0]) for split in names}

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels | list[bytes], Labels | None]:
        images, labels = self._images(split)
        if isinstance(images, np.ndarray):
            assert labels is not None
            return with_border(images[start:stop], self.height), labels[start:stop]
        shape = (self.height, self.width, self.channels)
        files = [Path(path) for path in images[start:stop]]
        return [fitted(_bytes(file), *shape, where=str(file), crop=CELEBA_CROP) for file in files], None

    def _images(self, split: str) -> tuple[Pixels | Sequence[str], Labels | None]:
        return torchvision_data(self.dataset, str(Path(self.path).expanduser().absolute()), split)


CELEBA_CROP = 140
"""Of 178x218: the face, with hair and without most of the background."""
EMBEDDED = (
    "digits",
    "glyphs",
    "fashion-mnist",
    "torchvision:cifar10",
    "torchvision:mnist",
    "torchvision:celeba",
)
"""What `build` knows."""


def build(name: str) -> Source:
    """The source called `name`, with its defaults.

    Raises:
        UserError: there is none.
    """
    match name.partition(":"):
        case ("digits", "", _):
            return Digits()
        case ("glyphs", "", _):
            return Glyphs()
        case ("fashion-mnist", "", _):
            return FashionMnist()
        case ("torchvision", _, ("cifar10" | "mnist" | "celeba") as dataset):
            return Torchvision(dataset)
    raise UserError(f"unknown source {name!r}; known are {', '.join(EMBEDDED)}")


def _check_border(size: int) -> None:
    if not 28 <= size <= 1024:
        raise UserError(f"size is {size}; a border can only make 28x28 images larger: 28..1024")


def _counts(rows: dict[str, Labels]) -> dict[str, int]:
    return {split: len(positions) for split, positions in rows.items()}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
