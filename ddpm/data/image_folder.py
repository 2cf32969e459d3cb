"""A folder of image files as a source, and the conversion of images of any size to stored ones.

A data set has one size and mode. An image that has them already keeps its bytes; any other is resized, cropped to the
centre square, and stored without loss.

Axes: N images, H W, C channels.
"""

import contextlib
import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps

from ddpm.config import SmallCount
from ddpm.data.manifest import Encoding
from ddpm.data.row_group import Labels, Pixels, open_image
from ddpm.data.sources import Seed, Square, UnreadableImages, divide
from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable
from ddpm.utils.retry import as_user_error

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""Formats that Pillow may try, whatever a file's name: some others start programs (EPS: Ghostscript)."""
PARTS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val"), "validation")
"""Split of a folder or file, by its name."""
MAX_FILE_BYTES = 1 << 30
NAMES_SHOWN = 3
"""Number of files that a message names."""
EXIF_ORIENTATION = 0x0112
GREY = ("1", "L", "LA", "I;16")
Listing = tuple[list[Path], list[Path]]
Picture = tuple[bytes | Exception, str, int | None]
"""The bytes of an image file, or why it cannot be read; its name in errors; its label."""


@dataclass(frozen=True)
class Pictures(Square, ABC):
    """A source of image files of any size, in parts such as "train" and "test"."""

    path: Path
    """The folder of the images; parquet: a Parquet file, a folder of them, or one that save_to_disk of Hugging Face's
    datasets wrote, or a name on the Hugging Face hub, such as uoft-cs/cifar10."""
    size: SmallCount
    """Height and width: the shorter side is resized to it, and the centre square kept."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: RGB."""
    encoding: Encoding = "encoded"
    """encoded: keep files that already fit, store others as PNG. raw: store pixels, larger but faster to read."""
    seed: Seed = 0
    """Seed of the order of images, and of the 5 % that are held out if there is no test or validation split."""

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(rows) for split, (_, rows) in self._rows.items()}

    @property
    def skipped(self) -> str:
        """Number and first names of the files that are not read, "5 other files, such as a, b.txt, c"; empty: none."""
        names = sorted(path.relative_to(self._top).as_posix() for path in self._skipped)
        shown = printable(", ".join(names[:NAMES_SHOWN]))
        return f"{len(names):,} other file{'s' * (len(names) > 1)}, such as {shown}" if names else ""

    def identity(self) -> dict[str, Any]:
        files = (file for files in self._files.values() for file in files)
        return asdict(self) | {"path": None, "files": digest_of_files(self._top, files)}

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels | Sequence[bytes], Labels | None]:
        part, rows = self._rows[split]
        return store(self._pictures(part, rows[start:stop]), self.size, self.channels, self.encoding)

    def statistics(self) -> str:
        """How many images have which size and mode; those that cannot be read do not count."""
        sizes, modes, small, long = Counter[str](), Counter[str](), 0, 0
        for data in self._opened():
            with contextlib.suppress(Exception), open_image(data, FORMATS) as image:
                sizes[f"{image.width}x{image.height}"] += 1
                modes[image.mode] += 1
                small += min(image.size) < self.size
                long += max(image.size) > 2 * min(image.size)
        common = [", ".join(f"{n:,} {key}" for key, n in of.most_common(3)) for of in (sizes, modes)]
        shape = f"{small:,} smaller than {self.size}, {long:,} longer than 2:1"
        return f"{common[0]} ({len(sizes):,} sizes); {common[1]}; {shape}"

    def _opened(self) -> Iterator[BinaryIO]:
        """The image files of all parts, as far as they can be read."""
        for part, rows in self._rows.values():
            for data, _, _ in self._pictures(part, rows):
                if isinstance(data, bytes):
                    yield io.BytesIO(data)

    @property
    def _top(self) -> Path:
        """The folder that the names of files start from."""
        return self.path

    @property
    @abstractmethod
    def _files(self) -> dict[str, list[Path]]:
        """The files of each part, sorted."""

    @property
    @abstractmethod
    def _skipped(self) -> list[Path]:
        """Files that are not read."""

    @property
    @abstractmethod
    def _rows(self) -> dict[str, tuple[str, Labels]]:
        """The part of each split, and its rows in it."""

    @abstractmethod
    def _pictures(self, part: str, rows: Labels) -> Iterator[Picture]:
        """The images in these rows of a part."""


@dataclass(frozen=True)
class Folder(Pictures):
    """A tree of image files. Subfolders are classes; without any there are no labels. If the subfolders are
    train and test (or val), these are the splits, and the classes are inside."""

    name: str = field(default="folder", init=False)

    def __post_init__(self) -> None:
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
        inside = [
            file.relative_to(self._folders[part]) for part, files in self._files.items() for file in files
        ]
        names = {file.parts[0] for file in inside if file.parent != Path()}
        if names and (without := [file for file in inside if file.parent == Path()]):
            raise UserError(
                f"{self.path}: {without[0]} is in no subfolder, but other images are; put all images into "
                "subfolders, one per class, or none"
            )
        for name in names:
            if name != name.encode(errors="replace").decode():
                raise UserError(f"{self.path}: the name of {printable(name)} is not UTF-8; rename this class")
        return tuple(sorted(names))

    def _pictures(self, part: str, rows: Labels) -> Iterator[Picture]:
        classes = {name: label for label, name in enumerate(self.class_names)}
        for file in (self._files[part][row] for row in rows.tolist()):
            yield read_file(file, classes.get(file.relative_to(self._folders[part]).parts[0]))

    def name_of(self, split: str, index: int) -> str:
        part, rows = self._rows[split]
        return str(self._files[part][rows[index]])

    def _opened(self) -> Iterator[BinaryIO]:
        for file in (file for of_part in self._files.values() for file in of_part):
            with contextlib.suppress(OSError), file.open("rb") as data:
                yield data  # of which the header is read

    def probe(self, most: int) -> tuple[int, Literal[1, 3]]:
        """The median of the shorter sides of at most so many images, and 1 channel if all of them are grey, else 3."""
        sides, channels = list[int](), 1
        files = self._files["train"]
        for file in files[:: -(-len(files) // most)]:
            with contextlib.suppress(Exception), file.open("rb") as data, open_image(data, FORMATS) as image:
                sides.append(min(image.size))
                channels = channels if image.mode in GREY else 3
        return (sorted(sides)[len(sides) // 2] if sides else 0), 1 if channels == 1 else 3

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """The folder of each part: subfolders, if they are "train" and other splits only (others without images do
        not count); else this folder."""
        try:
            below = {
                sub.name: sub for sub in self.path.iterdir() if sub.is_dir() and not sub.name.startswith(".")
            }
        except OSError as error:
            raise _unreadable(self.path, error) from None
        named = [(PARTS[key], sub) for name, sub in sorted(below.items()) if (key := name.lower()) in PARTS]
        parts, others = dict(named), set(below.values()) - {sub for _, sub in named}
        if "train" not in parts or len(parts) == 1 or any(list_files(sub, PICTURES)[0] for sub in others):
            return {"train": self.path}
        if len(parts) < len(named):
            shown = ", ".join(sub.name for _, sub in named)
            raise UserError(f"{self.path} has several folders of one split, of {shown}; keep one of each")
        return parts

    @cached_property
    def _listings(self) -> dict[str, Listing]:
        return {part: list_files(top, PICTURES) for part, top in self._folders.items()}

    @property
    def _skipped(self) -> list[Path]:
        skipped = [path for _, others in self._listings.values() for path in others]
        if self.path not in self._folders.values():
            skipped += [path for path in self.path.iterdir() if path not in self._folders.values()]
        return skipped

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        return {part: sorted(files) for part, (files, _) in self._listings.items()}

    @cached_property
    def _rows(self) -> dict[str, tuple[str, Labels]]:
        return divide({part: len(files) for part, files in self._files.items()}, self.seed)


def list_files(top: Path, suffixes: Collection[str]) -> Listing:
    """The files in a folder, and in all below it, that have one of `suffixes`; and all other entries except folders.

    Links to folders, and files and folders whose names begin with a dot (macOS writes ._x.jpg), are skipped.
    """
    listed, skipped = list[Path](), list[Path]()

    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error)

    for folder, subfolders, names in os.walk(top, onerror=refuse):
        left_out = [name for name in subfolders if name.startswith(".") or Path(folder, name).is_symlink()]
        subfolders[:] = set(subfolders) - {*left_out}
        skipped.extend(Path(folder, name) for name in left_out)
        for path in (Path(folder, name) for name in names):
            wanted = (
                path.suffix.lower() in suffixes and not path.name.startswith(".") and os.path.isfile(path)
            )
            (listed if wanted else skipped).append(path)
    return listed, skipped


def _unreadable(folder: Path | str, error: OSError) -> UserError:
    return UserError(f"cannot read {folder}: {error.strerror}; make it readable, or remove it")


def store(
    pictures: Iterable[Picture], size: int, channels: int, encoding: Encoding
) -> tuple[Pixels | list[bytes], Labels | None]:
    """Convert images to the form that a data set stores.

    Returns:
        encoded: each image's own bytes if they fit, else a PNG. raw: uint8 [N, size, size, channels]. And the labels,
        int64 [N]; None: there are none.
    """
    stored, labels, reasons = [], list[int | None](), list[str]()
    for data, where, label in pictures:
        try:
            stored.append(_stored(data, size, channels, encoding))
            labels.append(label)
        except Exception as error:  # Pillow raises a dozen types for damaged files
            reasons.append(f"{where}: {' '.join(str(getattr(error, 'strerror', None) or error).split())}")
    images = stored if encoding == "encoded" else np.reshape(stored, (-1, size, size, channels))
    known = None if None in labels else np.array(labels, np.int64)
    if reasons:
        raise UnreadableImages(reasons, images, known)
    return images, known


def read_file(path: Path, label: int | None = None) -> Picture:
    try:
        return files.read_whole(path, MAX_FILE_BYTES), str(path), label
    except (OSError, UserError) as error:
        return error, str(path), label


def digest_of_files(root: Path, paths: Iterable[Path]) -> str:
    """Hash of the files' names below `root` and their sizes."""
    with as_user_error(f"cannot read {root}"):  # for example, a file was removed after it was listed
        listing = sorted((f.relative_to(root).as_posix(), f.stat().st_size) for f in paths)
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _stored(data: bytes | Exception, size: int, channels: int, encoding: Encoding) -> Any:
    """One image as `store` returns it."""
    if isinstance(data, Exception):
        raise data
    mode = "L" if channels == 1 else "RGB"
    with open_image(io.BytesIO(data), FORMATS) as image:
        image.load()
        fits = (
            image.format in ("PNG", "JPEG", "WEBP")
            and (image.size, image.mode) == ((size, size), mode)
            and _orientation(image) == 1
            and not image.has_transparency_data
        )
        if fits and encoding == "encoded":
            return data
        picture = fitted(image, size, channels)
    if encoding == "raw":
        return np.asarray(picture, np.uint8)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def fitted(image: Image.Image, size: int, channels: int) -> Image.Image:
    """The image upright, in grey or RGB, resized and cropped to the centre square of `size`."""
    upright = ImageOps.exif_transpose(image) if _orientation(image) else image
    return ImageOps.fit(
        _converted(upright, "L" if channels == 1 else "RGB"), (size, size), Image.Resampling.LANCZOS
    )


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
