"""A folder of image files as a source, and the conversion of images of any size to stored ones.

A data set has one size and mode. An image that has them already keeps its bytes; any other is resized, cropped to the
centre square, and stored without loss.

Axes: N images, H W, C channels.
"""

import contextlib
import io
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ddpm.config.tree import PositiveInt, UpTo4096
from ddpm.data.manifest import Encoding
from ddpm.data.row_group import Labels, Pixels, open_image
from ddpm.data.sources.file_digests import digest_of_files
from ddpm.data.sources.sources import DataSeed, Square, UnreadableImages, divide
from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""Formats that Pillow may try, whatever a file's name: some others start programs (EPS: Ghostscript)."""
PARTS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
"""The part that a folder or a file belongs to, by its name."""
MAX_FILE_BYTES = 1 << 30
NAMES_SHOWN = 3
"""Number of files that a message names."""
EXIF_ORIENTATION = 0x0112
GREY_MODES = ("1", "L", "LA", "I;16")


class Listing(NamedTuple):
    """The entries of a folder, and of all below it, except folders."""

    files: list[Path]
    """Those with the wanted suffixes."""
    others: list[Path]


class ImageFile(NamedTuple):
    """An image file of a source."""

    content: bytes | Exception
    """An exception: why it cannot be read."""
    where: str
    """Its name in messages."""
    label: int | None


@dataclass(frozen=True)
class ImageFiles(Square, ABC):
    """A source of image files of any size, in parts such as "train" and "test"."""

    path: Path
    """The folder of the images; parquet: a Parquet file, a folder of them, or one that save_to_disk of Hugging Face's
    datasets wrote, or a name on the Hugging Face hub, such as uoft-cs/cifar10."""
    size: UpTo4096
    """Height and width: the shorter side is resized to it, and the centre square kept."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: RGB."""
    encoding: Encoding = "encoded"
    """encoded: keep files that already fit, store others as PNG. raw: store pixels, larger but faster to read."""
    seed: DataSeed = 0
    """Seed of the order of images, and of those that are held out if there is no test or validation split."""
    held_out_images: PositiveInt | None = None
    """Number of held-out images if there is no such split. None: 5 %, or of fewer than 2,000 images a tenth, at least
    20."""

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(rows) for split, (_, rows) in self._rows.items()}

    def identity(self) -> dict[str, Any]:
        found = asdict(self) | {"path": None, "files": digest_of_files(self._top, self._all_files)}
        del found["held_out_images"]  # the sizes of the splits tell it
        return found

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels | Sequence[bytes], Labels | None]:
        part, rows = self._rows[split]
        return store(self._image_files(part, rows[start:stop]), self.size, self.channels, self.encoding)

    @property
    def _top(self) -> Path:
        """The folder that the names of files start from."""
        return self.path

    @property
    @abstractmethod
    def _all_files(self) -> list[Path]:
        """The files that hold the images."""

    @property
    @abstractmethod
    def _rows(self) -> dict[str, tuple[str, Labels]]:
        """The part of each split, and its rows in it."""

    @abstractmethod
    def _image_files(self, part: str, rows: Labels) -> Iterator[ImageFile]:
        """The images in these rows of a part."""


@dataclass(frozen=True)
class Folder(ImageFiles):
    """A tree of image files. Subfolders are classes; without any there are no labels. If the subfolders are
    train and test (or val), these are the splits, and the classes are inside."""

    name: str = field(default="folder", init=False)

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder; --path names the folder of the images")
        if not all(self._files.values()):
            also = f"; skipped: {self.skipped}" if self.skipped else ""
            raise UserError(
                f"{self.path} holds no images ({' '.join(sorted(SUFFIXES))}), or one of its splits holds none{also}"
            )
        _ = self.class_names, self.splits

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        names = set()
        unlabelled = []
        for part, of_part in self._files.items():
            for file in of_part:
                inside = file.relative_to(self._folders[part])
                if inside.parent == Path():
                    unlabelled.append(inside)
                else:
                    names.add(inside.parts[0])
        if names and unlabelled:
            raise UserError(
                f"{self.path}: {unlabelled[0]} is in no subfolder, but other images are; put all images into "
                "subfolders, one per class, or none"
            )
        for name in names:
            if name != name.encode(errors="replace").decode():
                raise UserError(f"{self.path}: the name of {printable(name)} is not UTF-8; rename this class")
        return tuple(sorted(names))

    def _image_files(self, part: str, rows: Labels) -> Iterator[ImageFile]:
        labels = {name: label for label, name in enumerate(self.class_names)}
        for row in rows.tolist():
            file = self._files[part][row]
            yield read_file(file, labels.get(file.relative_to(self._folders[part]).parts[0]))

    @property
    def skipped(self) -> str:
        """Number and first names of the files that are not read, "5 other files, such as a, b.txt, c"; empty: none."""
        names = sorted(path.relative_to(self.path).as_posix() for path in self._skipped)
        if not names:
            return ""
        counted = "1 other file" if len(names) == 1 else f"{len(names):,} other files"
        return f"{counted}, such as {printable(', '.join(names[:NAMES_SHOWN]))}"

    def name_of(self, split: str, index: int) -> str:
        """The name of an image's file."""
        part, rows = self._rows[split]
        return str(self._files[part][rows[index]])

    def probe(self, most: int) -> tuple[int, Literal[1, 3]]:
        """The median of the shorter sides of at most `most` images, and 1 channel if all of them are grey, else 3."""
        sides = list[int]()
        channels: Literal[1, 3] = 1
        files = self._files["train"]
        every = math.ceil(len(files) / most)
        for file in files[::every]:
            with contextlib.suppress(Exception), file.open("rb") as data, open_image(data, FORMATS) as image:
                sides.append(min(image.size))
                if image.mode not in GREY_MODES:
                    channels = 3
        median = sorted(sides)[len(sides) // 2] if sides else 0
        return median, channels

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """The folder of each part: the subfolders, if they are "train" and other parts only; else this folder.

        Other subfolders do not count if there are no images in them.
        """
        try:
            subfolders = [
                folder
                for folder in self.path.iterdir()
                if folder.is_dir() and not folder.name.startswith(".")
            ]
        except OSError as error:
            raise _unreadable(self.path, error) from None
        named = sorted(folder for folder in subfolders if folder.name.lower() in PARTS)
        parts = {PARTS[folder.name.lower()]: folder for folder in named}
        if "train" not in parts or len(parts) == 1:
            return {"train": self.path}
        for folder in subfolders:
            if folder not in named and list_files(folder, SUFFIXES).files:
                return {"train": self.path}
        if len(parts) < len(named):
            names = ", ".join(folder.name for folder in named)
            raise UserError(f"{self.path} has several folders of one split, of {names}; keep one of each")
        return parts

    @cached_property
    def _listings(self) -> dict[str, Listing]:
        return {part: list_files(folder, SUFFIXES) for part, folder in self._folders.items()}

    @property
    def _all_files(self) -> list[Path]:
        return [file for of_part in self._files.values() for file in of_part]

    @property
    def _skipped(self) -> list[Path]:
        """Files that are not read."""
        skipped = [path for listing in self._listings.values() for path in listing.others]
        folders = self._folders.values()
        if self.path not in folders:
            skipped += [path for path in self.path.iterdir() if path not in folders]
        return skipped

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """The files of each part, sorted."""
        return {part: sorted(listing.files) for part, listing in self._listings.items()}

    @cached_property
    def _rows(self) -> dict[str, tuple[str, Labels]]:
        sizes = {part: len(files) for part, files in self._files.items()}
        return divide(sizes, self.seed, self.held_out_images)


def list_files(top: Path, suffixes: Collection[str]) -> Listing:
    """List the files in a folder, and in all below it, by whether they have one of `suffixes`.

    Links to folders, and files and folders whose names begin with a dot (macOS writes ._x.jpg), are among the others.
    """
    listing = Listing([], [])

    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error)

    for folder, subfolders, names in os.walk(top, onerror=refuse):
        for name in list(subfolders):
            path = Path(folder, name)
            if name.startswith(".") or path.is_symlink():
                subfolders.remove(name)  # os.walk does not enter it
                listing.others.append(path)
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in suffixes and not name.startswith(".") and os.path.isfile(path):
                listing.files.append(path)
            else:
                listing.others.append(path)
    return listing


def _unreadable(folder: Path | str, error: OSError) -> UserError:
    return UserError(f"cannot read {folder}: {error.strerror}; make it readable, or remove it")


def store(
    image_files: Iterable[ImageFile], size: int, channels: int, encoding: Encoding
) -> tuple[Pixels | list[bytes], Labels | None]:
    """Convert images to the form that a data set stores.

    Returns:
        encoded: each image's own bytes if they fit, else a PNG. raw: uint8 [N, size, size, channels]. And the labels,
        int64 [N]; None: there are none.
    """
    stored = []
    labels = list[int | None]()
    reasons = list[str]()
    for content, where, label in image_files:
        try:
            stored.append(_stored(content, size, channels, encoding))
            labels.append(label)
        except Exception as error:  # Pillow raises a dozen types for damaged files
            reason = getattr(error, "strerror", None) or error
            reasons.append(f"{where}: {' '.join(str(reason).split())}")
    images = stored if encoding == "encoded" else np.reshape(stored, (-1, size, size, channels))
    known = None if None in labels else np.array(labels, np.int64)
    if reasons:
        raise UnreadableImages(reasons, images, known)
    return images, known


def read_file(path: Path, label: int | None = None) -> ImageFile:
    try:
        return ImageFile(files.read_whole(path, MAX_FILE_BYTES), str(path), label)
    except (OSError, UserError) as error:
        return ImageFile(error, str(path), label)


def _stored(content: bytes | Exception, size: int, channels: int, encoding: Encoding) -> Any:
    """One image as `store` returns it."""
    if isinstance(content, Exception):
        raise content
    with open_image(io.BytesIO(content), FORMATS) as image:
        image.load()
        fits = (
            image.format in ("PNG", "JPEG", "WEBP")
            and image.size == (size, size)
            and image.mode == ("L" if channels == 1 else "RGB")
            and _orientation(image) == 1
            and not image.has_transparency_data
        )
        if fits and encoding == "encoded":
            return content
        converted = fitted(image, size, channels)
    if encoding == "raw":
        return np.asarray(converted, np.uint8)
    file = io.BytesIO()
    converted.save(file, "PNG")
    return file.getvalue()


def fitted(image: Image.Image, size: int, channels: int) -> Image.Image:
    """The image upright, in grey or RGB, resized and cropped to the centre square of `size`."""
    if _orientation(image) is not None:
        image = ImageOps.exif_transpose(image)
    converted = _converted(image, "L" if channels == 1 else "RGB")
    return ImageOps.fit(converted, (size, size), Image.Resampling.LANCZOS)


def _orientation(image: Image.Image) -> int | None:
    """The orientation in an image's EXIF, 1 if there is none; None: the EXIF is damaged; the pixels may be sound."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises several types
        return None


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Convert to `mode`, transparency to white, and 16-bit grey to 8 bits (Pillow would clip it)."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit ({image.mode}); store it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
