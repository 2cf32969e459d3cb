"""A folder of image files as a source, and what it shares with other sources of image files.

Axes: N images, H W, C channels.
"""

import contextlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ddpm.config.tree import PositiveInt, UpTo4096
from ddpm.data.manifest import Encoding
from ddpm.data.row_group import Labels, Pixels, open_image
from ddpm.data.sources.conversion import FORMATS, ImageFile, read_file, store
from ddpm.data.sources.file_digests import digest_of_files
from ddpm.data.sources.sources import PARTS, DataSeed, InParts, Square, by_part
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
NAMES_SHOWN = 3
"""Number of files that a message names."""
GREY_MODES = ("1", "L", "LA", "I;16")


class Listing(NamedTuple):
    """The entries of a folder, and of all below it, except folders."""

    files: list[Path]
    """Those with the wanted suffixes, sorted."""
    others: list[Path]


@dataclass(frozen=True)
class ImageFiles(Square, InParts, ABC):
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
    test_images: PositiveInt | None = None
    """Images that are held out as the split test, if there is no split test or validation. None: 5 %, or of fewer than
    2,000 images a tenth, at least 20."""

    def identity(self) -> dict[str, Any]:
        identity = asdict(self) | {"files": digest_of_files(self._top, self._all_files)}
        del identity["path"], identity["test_images"]  # the sizes of the splits imply test_images
        return identity

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
        # Images that cannot be used are an error here.
        _ = self.class_names
        _ = self.splits

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
        skipped = [path for listing in self._listings.values() for path in listing.others]
        folders = self._folders.values()
        if self.path not in folders:  # what is beside the folders of the parts
            skipped += [path for path in self.path.iterdir() if path not in folders]
        names = sorted(path.relative_to(self.path).as_posix() for path in skipped)
        if not names:
            return ""
        counted = "1 other file" if len(names) == 1 else f"{len(names):,} other files"
        return f"{counted}, such as {printable(', '.join(names[:NAMES_SHOWN]))}"

    def name_of(self, split: str, index: int) -> str:
        """The name of an image's file."""
        part, rows = self._rows[split]
        return str(self._files[part][rows[index]])

    def probe(self, max_images: int) -> tuple[int, Literal[1, 3]]:
        """The median of the shorter sides of at most `max_images` images; 1 channel if all of them are grey, else 3."""
        sides = list[int]()
        channels: Literal[1, 3] = 1
        files = self._files["train"]
        every = math.ceil(len(files) / max_images)
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
        parts = {PARTS[folder.name.lower()] for folder in named}
        if "train" not in parts or len(parts) == 1:
            return {"train": self.path}
        for folder in subfolders:
            if folder not in named and list_files(folder, SUFFIXES).files:
                return {"train": self.path}
        return by_part([(folder.name, folder) for folder in named], str(self.path))

    @cached_property
    def _listings(self) -> dict[str, Listing]:
        return {part: list_files(folder, SUFFIXES) for part, folder in self._folders.items()}

    @property
    def _all_files(self) -> list[Path]:
        return [file for of_part in self._files.values() for file in of_part]

    @property
    def _files(self) -> dict[str, list[Path]]:
        return {part: listing.files for part, listing in self._listings.items()}

    @property
    def _part_sizes(self) -> dict[str, int]:
        return {part: len(files) for part, files in self._files.items()}


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
    listing.files.sort()
    return listing


def _unreadable(folder: Path | str, error: OSError) -> UserError:
    return UserError(f"cannot read {folder}: {error.strerror}; make it readable, or remove it")
