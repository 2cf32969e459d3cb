"""A folder of image files as a source, and the conversion of images of any size to stored ones.

A data set has one size and mode. An image that has them already keeps its bytes; any other is resized, cropped to the
centre square, and stored without loss.

Axes: N images, H W, C channels.
"""

import hashlib
import io
import json
import os
import stat
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm.data.manifest import PICTURES
from ddpm.data.row_group import open_image
from ddpm.data.sources import Labels, Pixels, Square, divide
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable
from ddpm.utils.retry import as_user_error

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that Pillow may try, whatever a file's name: some others start programs (EPS: Ghostscript)."""
PARTS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val"), "validation")
"""Split of a folder or file, by its name."""
MAX_SIZE = 4096
NAMES_SHOWN = 3
"""Number of files that a message names."""
SPECIAL = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
EXIF_ORIENTATION = 0x0112
Encoding = Literal["encoded", "raw"]


@dataclass(frozen=True)
class Folder(Square):
    """A tree of image files. Subfolders are classes; without any there are no labels. If the subfolders are
    train and test (or val), these are the splits, and the classes are inside."""

    path: Path
    """The folder."""
    size: int
    """Height and width: the shorter side is resized to it, and the centre square kept."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: RGB."""
    encoding: Encoding = "encoded"
    """encoded: keep files that already fit, store others as PNG. raw: store pixels, larger but faster to read."""
    seed: int = 0
    """Seed of the order of images, and of the 5 % that are held out if the folder has no test or val split."""
    name: str = field(default="folder", init=False)

    def __post_init__(self) -> None:
        check_size(self.size)
        if not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder; --path names the folder of the images")
        if not all(self._files.values()):
            also = f"; skipped: {self.skipped}" if self.skipped else ""
            raise UserError(
                f"{self.path} holds no images ({' '.join(sorted(PICTURES))}), or one of its splits holds none{also}"
            )
        _ = self.class_names, self.splits

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        files = [file for files in self._files.values() for file in files]
        names = {file.parts[0] for file in files if file.parent != Path()}
        if names and (without := [file for file in files if file.parent == Path()]):
            raise UserError(
                f"{self.path}: {without[0]} is in no subfolder, but other images are; put all images into "
                "subfolders, one per class, or none"
            )
        return tuple(sorted(names))

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(rows) for split, (_, rows) in self._rows.items()}

    @property
    def skipped(self) -> str:
        """Files beside the images that are not read: counts by kind, and the first names."""
        found = [entry for listing in self._listings.values() for entry in listing.skipped]
        tops = self._folders.values()
        if self.path not in tops:
            beside = list_files(self.path, (), recursive=False).skipped
            found += [(kind, path) for kind, path in beside if path not in tops]
        return Listing([], found).describe(self.path)

    def check(self) -> None:
        """Read the header of every image, which is much faster than decoding.

        Raises:
            UserError: some files cannot be read, are not images, or are too large.
        """
        bad = []
        for file in (self._folders[part] / file for part, files in self._files.items() for file in files):
            try:
                with file.open("rb") as opened, open_image(opened, FORMATS):
                    pass
            except Exception as error:  # Pillow raises a dozen types for damaged files
                bad.append((file, error))
        if bad:
            raise _cannot_read(*bad[0], others=[file for file, _ in bad[1:]])

    def identity(self) -> dict[str, Any]:
        files = [self._folders[part] / file for part, files in self._files.items() for file in files]
        return asdict(self) | {"path": None, "files": digest_of_files(self.path, files)}

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels | Sequence[bytes], Labels | None]:
        part, rows = self._rows[split]
        chosen = [self._files[part][row] for row in rows[start:stop].tolist()]
        paths = [self._folders[part] / file for file in chosen]
        images = store(map(read_file, paths), self.size, self.channels, self.encoding)
        if not self.class_names:
            return images, None
        classes = {name: label for label, name in enumerate(self.class_names)}
        return images, np.array([classes[file.parts[0]] for file in chosen], np.int64)

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """The folder of each part: subfolders, if they are "train" and other splits only; else this folder."""
        try:
            below = {
                sub.name: sub for sub in self.path.iterdir() if sub.is_dir() and not sub.name.startswith(".")
            }
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if "train" in below and len(below) > 1 and set(below) <= set(PARTS):
            return {PARTS[name]: sub for name, sub in sorted(below.items())}
        return {"train": self.path}

    @cached_property
    def _listings(self) -> dict[str, "Listing"]:
        return {part: list_files(top, PICTURES) for part, top in self._folders.items()}

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """The images of each part, relative to its folder."""
        return {
            part: sorted(file.relative_to(self._folders[part]) for file in listing.files)
            for part, listing in self._listings.items()
        }

    @cached_property
    def _rows(self) -> dict[str, tuple[str, Labels]]:
        return divide({part: len(files) for part, files in self._files.items()}, self.seed)


@dataclass(frozen=True)
class Listing:
    """The content of a folder."""

    files: list[Path]
    """Files with the requested suffixes."""
    skipped: list[tuple[str, Path]]
    """All other entries except folders: kind (".gif", "FIFO") and path."""

    def describe(self, top: Path) -> str:
        """Counts of skipped entries by kind, with the first names: "2 .gif (a.gif, b.gif), 1 FIFO (c.png)"."""
        kinds: dict[str, list[str]] = {}
        for kind, path in self.skipped:
            kinds.setdefault(kind, []).append(path.relative_to(top).as_posix())
        shown = (f"{len(names):,} {kind} ({_first(sorted(names))})" for kind, names in sorted(kinds.items()))
        return ", ".join(map(printable, shown))


def list_files(top: Path, suffixes: Collection[str], recursive: bool = True) -> Listing:
    """The files in a folder, and in all below it, that have one of `suffixes`. Links to folders are not followed.

    Raises:
        UserError: a folder cannot be read.
    """
    listing = Listing([], [])

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error)

    for folder, subfolders, names in os.walk(top, onerror=refuse):
        linked = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        listing.skipped.extend(("link to a folder", Path(folder, name)) for name in linked)
        for path in (Path(folder, name) for name in names):
            kind = _kind_of(path)
            if kind in suffixes:
                listing.files.append(path)
            else:
                listing.skipped.append((kind, path))
        if not recursive:
            break
    return listing


def store(
    pictures: Iterable[tuple[bytes, str]], size: int, channels: int, encoding: Encoding
) -> Pixels | list[bytes]:
    """Convert images to the form that a data set stores.

    Args:
        pictures: the bytes of each file, and its name in errors.

    Returns:
        encoded: each image's own bytes if they fit, else a PNG. raw: uint8 [N, size, size, channels].

    Raises:
        UserError: an image cannot be decoded, or is too large.
    """
    stored, pixels = [], []
    for data, where in pictures:
        image, fits = _load(data, size, channels, where)
        if encoding == "raw":
            pixels.append(np.asarray(image, np.uint8).reshape(size, size, channels))
        elif fits:
            stored.append(data)
        else:
            file = io.BytesIO()
            image.save(file, "PNG")
            stored.append(file.getvalue())
    return np.stack(pixels) if encoding == "raw" else stored


def read_file(path: Path) -> tuple[bytes, str]:
    """The file's bytes, and its name in errors.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def check_size(size: int) -> None:
    """Raise UserError if images cannot be stored at `size`."""
    if not 1 <= size <= MAX_SIZE:
        raise UserError(f"--size is {size}; it must be in 1..{MAX_SIZE}")


def digest_of_files(root: Path, files: Iterable[Path]) -> str:
    """Hash of the files' names below `root` and their sizes."""
    with as_user_error(f"cannot read {root}"):  # for example, a file was removed after it was listed
        listing = sorted((f.relative_to(root).as_posix(), f.stat().st_size) for f in files)
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _load(data: bytes, size: int, channels: int, where: str) -> tuple[Image.Image, bool]:
    """The picture at its final size, and whether `data` is that picture already."""
    mode = "L" if channels == 1 else "RGB"
    try:
        with open_image(io.BytesIO(data), FORMATS) as image:
            image.load()
            fits = (
                image.format in ("PNG", "JPEG", "WEBP")
                and (image.size, image.mode) == ((size, size), mode)
                and image.getexif().get(EXIF_ORIENTATION, 1) == 1
                and not image.has_transparency_data
            )
            upright = ImageOps.exif_transpose(image)
            return ImageOps.fit(_converted(upright, mode), (size, size), Image.Resampling.LANCZOS), fits
    except UnidentifiedImageError:  # its message has a memory address
        what = f"it is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
        raise UserError(f"cannot read the image {where}: {what}; repair it or remove it") from None
    except Exception as error:  # Pillow raises a dozen types for damaged files
        raise _cannot_read(where, error) from None


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


def _kind_of(path: Path) -> str:
    """The kind of a file: its lower-case suffix, or its type if it is not a regular file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "broken link"
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(mode):
        return SPECIAL.get(stat.S_IFMT(mode), "special file")
    return path.suffix.lower() or "without a suffix"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path}: {error.strerror}; make it readable, or remove it")


def _cannot_read(where: str | Path, error: Exception, others: Sequence[Path] = ()) -> UserError:
    """The error for an image that cannot be decoded, and for `others` like it."""
    also = f" (and {len(others):,} more: {_first([str(file) for file in others])})" if others else ""
    reason, them = getattr(error, "strerror", None) or error, "them" if others else "it"
    return UserError(
        f"cannot read the image {where}: {reason}{also}; repair {them} or remove {them}, then run the same "
        "command again"
    )
