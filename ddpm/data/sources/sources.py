"""The interface of image sources, what several share, and the source `digits`.

A source is a frozen dataclass of its options. It knows the number of images of each split, and reads any range of
them, so that tasks can read ranges concurrently. The same options always give the same images.
If a source has no test or validation split, a seeded share is held out as "test" (`num_held_out`).

digits: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI 1998 (through scikit-learn).

Axes: N images, H W, C channels.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from annotated_types import Interval

from ddpm.data.row_group import Labels, Pixels
from ddpm.utils.errors import UserError

HELD_OUT_SHARE = 0.05
"""Share of a large folder's images that is held out."""
HELD_OUT_SHARE_OF_FEW = 0.1
MOST_OF_FEW = 100
"""Held-out images above which the share falls to HELD_OUT_SHARE."""
LEAST_HELD_OUT = 20
"""Images that an evaluation needs; of 100 images this many are held out."""
MAX_EXAMINED = 500_000
"""More images are not searched for duplicates: it takes minutes."""
PARTS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
"""The part that a folder or a file belongs to, by its name."""
DataSeed = Annotated[int, Interval(ge=0, lt=2**32)]
"""A seed of NumPy's RandomState."""
T = TypeVar("T")


class Source(Protocol):
    """Images with a known shape, in splits of known size.

    `prepare` calls `read` from many processes, so a source is pickled; large data is loaded where it is
    needed, and kept in cached properties.
    """

    @property
    def name(self) -> str: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int:
        return self.height

    @property
    def channels(self) -> int: ...
    @property
    def encoding(self) -> Literal["raw", "encoded"]: ...
    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty: there are no labels."""

    @property
    def splits(self) -> dict[str, int]:
        """Images in each split."""

    def identity(self) -> dict[str, Any]:
        """Everything that determines the images, as JSON: options, and digests of files as they are at this call.

        After reading it must be as before, else what was read is not kept.
        """

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels | Sequence[bytes], Labels | None]:
        """Images [start, stop) of the split: uint8 [N, H, W, C] (raw) or files' bytes (encoded); labels [N].

        Raises:
            UnreadableImages: some cannot be read; `prepare` reads on, and then names all of them or leaves them out.
        """


class MissingFiles(UserError):
    """The files of a source are missing; `flags` tell ddpm prepare where they are."""

    def __init__(self, message: str, flags: str) -> None:
        super().__init__(message)
        self.flags = flags


class UnreadableImages(UserError):
    """Some images of a range cannot be read: `reasons` ("cats/1.png: ..."). The others are `images` and `labels`."""

    def __init__(
        self, reasons: Sequence[str], images: Pixels | Sequence[bytes], labels: Labels | None = None
    ) -> None:
        super().__init__(f"cannot read the image {reasons[0]}")
        self.reasons = reasons
        self.images = images
        self.labels = labels


class Square(Source, Protocol):
    """A source of images whose height and width are its option `size`."""

    size: int

    @property
    def height(self) -> int:
        return self.size


class InParts(Source, Protocol):
    """A source whose images are in parts, such as "train" and "test", of which `divide` makes the splits."""

    seed: int
    test_images: int | None

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(rows) for split, (_, rows) in self._rows.items()}

    @cached_property
    def _rows(self) -> dict[str, tuple[str, Labels]]:
        """The part of each split, and its rows in it."""
        return divide(self._part_sizes, self.seed, self.test_images)

    @property
    @abstractmethod
    def _part_sizes(self) -> dict[str, int]:
        """Images in each part."""


class Loaded(Source, Protocol):
    """A source whose images are all in memory, and padded with black to its height when they are read."""

    @property
    @abstractmethod
    def _images(self) -> dict[str, tuple[Pixels, Labels]]:
        """uint8 [N, h, w, C] and labels [N] of each split."""

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(labels) for split, (_, labels) in self._images.items()}

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels | Sequence[bytes], Labels | None]:
        images, labels = self._images[split]
        return pad(images[start:stop], self.height), labels[start:stop]


@dataclass(frozen=True)
class Digits(Loaded):
    """1,797 real handwritten digits, 8x8 grey, from scikit-learn; nothing is downloaded."""

    class_names: ClassVar = tuple("0123456789")
    seed: DataSeed = 0
    """Seed that decides which images are held out."""
    test_images: Annotated[int, Interval(ge=1, le=1796)] = 297
    """Images that are held out as the split test; many, since scores against few real images are uncertain."""
    name: str = field(default="digits", init=False)
    height: int = field(default=8, init=False)
    width: int = field(default=8, init=False)
    channels: int = field(default=1, init=False)
    encoding: Literal["raw"] = field(default="raw", init=False)

    def identity(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def _images(self) -> dict[str, tuple[Pixels, Labels]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Pixel values are 0..16.
        images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
        labels = digits.target.astype(np.int64)
        splits = held_out(len(labels), self.seed, self.test_images)
        return {split: (images[rows], labels[rows]) for split, rows in splits.items()}


def by_part(named: Iterable[tuple[object, T]], where: str) -> dict[str, T]:
    """The parts of a source by the names that `divide` knows: "val" and "valid" become "validation"."""
    parts: dict[str, T] = {}
    names = []
    for key, part in named:
        name = str(key)
        names.append(name)
        parts[PARTS.get(name.lower(), name)] = part
    if len(parts) < len(names):
        raise UserError(f"{where} has one split by several names, among {', '.join(names)}; keep one of each")
    if "train" not in parts:
        raise UserError(f"{where} has the splits {', '.join(names)}; train is missing")
    return parts


def pad(images: Pixels, size: int) -> Pixels:
    """Pad [N, h, w, C] with zeros to [N, size, size, C]; an odd pixel goes to the bottom and right."""
    height, width = images.shape[1:3]
    top = (size - height) // 2
    left = (size - width) // 2
    return np.pad(images, [(0, 0), (top, size - height - top), (left, size - width - left), (0, 0)])


def num_held_out(n: int) -> int:
    """The number of images held out of n.

    5 % of many; of fewer than 2,000 a tenth, at least 20 and at most 100; never more than a fifth.
    """
    of_few = max(LEAST_HELD_OUT, min(round(n * HELD_OUT_SHARE_OF_FEW), MOST_OF_FEW))
    return max(1, min(of_few, n // 5), round(n * HELD_OUT_SHARE))


def held_out(n: int, seed: int, num_test: int | None = None) -> dict[str, Labels]:
    """Rows of "train" and of "test" (num_test None: `num_held_out`), both in a seeded order."""
    if n < 2:
        raise UserError(f"the source has {n} image(s); at least 2 are needed, to hold one out")
    if num_test is not None and num_test >= n:
        raise UserError(f"test_images is {num_test}, but the source has {n} images; hold out fewer")
    # RandomState, since numpy guarantees its streams: the same rows with every numpy.
    order = np.random.RandomState(seed).permutation(n).astype(np.int64)
    if num_test is None:
        num_test = num_held_out(n)
    return {"train": order[num_test:], "test": order[:num_test]}


def divide(sizes: dict[str, int], seed: int, num_test: int | None = None) -> dict[str, tuple[str, Labels]]:
    """The splits of a source that has parts: for each split, its part and its rows in a seeded order.

    The order matters if a part is sorted by class, since training shuffles within windows only.
    Without a part "test", "validation" is used as "test"; without either, some of "train" are held out, as by
    `held_out`.
    """
    if "test" not in sizes and "validation" not in sizes:
        return {split: ("train", rows) for split, rows in held_out(sizes["train"], seed, num_test).items()}
    names = {part: part for part in sizes}
    if "test" not in sizes:
        names["validation"] = "test"
    return {
        names[part]: (part, np.random.RandomState(seed).permutation(n).astype(np.int64))
        for part, n in sizes.items()
    }
