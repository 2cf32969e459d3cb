"""Images of any size become those of a data set, which have one size and one mode.

An image that has them already keeps its bytes; any other is resized, cropped to the centre square, and stored without
loss.

Axes: N images, H W, C channels.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ddpm.data.manifest import Encoding
from ddpm.data.row_group import Labels, Pixels, open_image
from ddpm.data.sources.sources import UnreadableImages
from ddpm.utils import files
from ddpm.utils.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""Formats that Pillow may try, whatever a file's name: some others start programs (EPS: Ghostscript)."""
MAX_FILE_BYTES = 1 << 30
EXIF_ORIENTATION = 0x0112


class ImageFile(NamedTuple):
    """An image file of a source."""

    content: bytes | Exception
    """An exception: why it cannot be read."""
    where: str
    """Its name in messages."""
    label: int | None


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
