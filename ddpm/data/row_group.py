"""The content of a row group: Arrow's columns as pixels and labels, and the checksum over both.

Axes: N images, H W, C channels.
"""

import hashlib
import io
import math
import warnings
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ddpm.data.manifest import Manifest
from ddpm.utils.errors import UserError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
JPEG_BEGINS = b"\xff\xd8"
LARGEST_JPEG_SCALE = 8
"""A JPEG's blocks have 8 x 8 pixels."""
MAX_PIXELS = 1 << 26
"""Largest image that is decoded: 8192 x 8192. Converting a transparent one takes 16 bytes per pixel, 1 GiB, and every
core may do so at once; 60-megapixel cameras are below it."""


class CorruptData(UserError):
    """A shard cannot be read, or its content contradicts the manifest."""


@dataclass(frozen=True)
class RowGroup:
    """A row group as stored, its checksum verified; single rows may still not be images."""

    where: str
    """Shard and row group, for errors."""
    image: pa.Array
    label: Labels | None
    manifest: Manifest

    def rows(self, rows: NDArray[np.int64] | None = None, scale: int = 1) -> tuple[Pixels, Labels | None]:
        """Decode the given rows, in this order; None: all. Encoded images at 1 / `scale` of their size.

        Returns:
            uint8 [N, H, W, C] (raw images may be a view of what was read), and int64 [N] or None.
        """
        wanted = np.arange(len(self.image)) if rows is None else rows
        label = None if self.label is None else self.label[wanted]
        num_classes = len(self.manifest.class_names)
        if label is not None:
            wrong = np.flatnonzero((label < 0) | (label >= num_classes))
            if len(wrong):
                raise CorruptData(
                    f"{self.where}, row {wanted[wrong[0]]}: the label is {label[wrong[0]]}, which is not in "
                    f"0..{num_classes - 1}"
                )
        if self.manifest.encoding == "raw":
            pixels = _raw(self.image, self.manifest)
            return pixels if rows is None else pixels[rows], label
        height, width, channels = self.manifest.shape
        decoded = np.empty((len(wanted), height // scale, width // scale, channels), np.uint8)
        for i, row in enumerate(wanted.tolist()):
            try:
                decoded[i] = decode(self.image[row].as_py(), height, width, channels, scale)
            except ValueError as error:
                raise CorruptData(f"{self.where}, row {row}: {' '.join(str(error).split())}") from None
        return decoded, label


def columns(table: pa.Table) -> tuple[pa.Array, Labels | None]:
    """Images and labels of a row group."""
    label = table.column("label").to_numpy() if "label" in table.column_names else None
    return table.column("image").combine_chunks(), label


def content_sha256(image: pa.Array, label: Labels | None) -> str:
    """SHA-256 of the content of a row group, independent of how Parquet stores it.

    It covers, in this order: lengths of encoded images (variable binary) as little-endian int64; the bytes of all
    images in the order of the rows; the labels as little-endian int64, if there are any.

    Args:
        image: [N] binary or fixed-size binary, without nulls.
        label: int64 [N].
    """
    digest = hashlib.sha256()
    if pa.types.is_fixed_size_binary(image.type):
        size = image.type.byte_width
        digest.update(_bytes(image, 1)[image.offset * size : (image.offset + len(image)) * size])
    else:
        ends = np.frombuffer(_bytes(image, 1), np.int32)[image.offset : image.offset + len(image) + 1]
        digest.update(np.diff(ends).astype("<i8").tobytes())
        digest.update(_bytes(image, 2)[ends[0] : ends[-1]])
    if label is not None:
        digest.update(np.asarray(label, "<i8").tobytes())
    return digest.hexdigest()


def decode(data: bytes, height: int, width: int, channels: int, scale: int = 1) -> Pixels:
    """An encoded image as uint8 [H / scale, W / scale, C]: each pixel the mean of scale x scale stored ones.

    A JPEG is decoded directly at 1/2, 1/4 or 1/8 of its size: the inverse DCT uses only the lowest frequencies of a
    block, which is that mean to some 46 dB, in a third of the time. simplejpeg decodes most JPEGs, with the same
    library as Pillow and a fifth to a third faster; Pillow decodes those that simplejpeg refuses.

    Raises:
        ValueError: `data` is not a PNG, JPEG or WebP, or has another size (known from its header, before any pixel
            is decoded).
    """
    pixels = _jpeg(data, height, width, channels, scale)
    if pixels is not None:
        return pixels
    try:
        with open_image(io.BytesIO(data), ("PNG", "JPEG", "WEBP")) as image:
            if image.size == (width, height):
                if scale > 1:
                    factor = math.gcd(scale, LARGEST_JPEG_SCALE)
                    image.draft(None, (width // factor, height // factor))  # does nothing unless it is a JPEG
                converted = image.convert("L" if channels == 1 else "RGB")
                if converted.width * scale > width:
                    converted = converted.reduce(converted.width * scale // width)
                pixels = np.asarray(converted, np.uint8)
                return pixels.reshape(height // scale, width // scale, channels)
            stored_width, stored_height = image.size
    except Exception as error:  # Pillow raises a dozen types for damaged files
        raise ValueError(f"the image cannot be decoded: {error}") from None
    raise ValueError(f"the image is {stored_height}x{stored_width}; the manifest says {height}x{width}")


def open_image(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """Open an image file that has one of `formats`, such as "PNG"; no pixel is decoded.

    Raises:
        ValueError: it has none of them, or more than MAX_PIXELS. Pillow raises other types for damaged headers.
    """
    too_large = f"it has more than {MAX_PIXELS:,} pixels, the most that are decoded"
    try:
        with warnings.catch_warnings():
            # Pillow only warns between its own limit and twice that; MAX_PIXELS is below both.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=formats)
    except UnidentifiedImageError:  # its message has a memory address
        raise ValueError(f"it is not a {', '.join(formats[:-1])} or {formats[-1]} file") from None
    except Image.DecompressionBombError:
        raise ValueError(too_large) from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height}"
        image.close()
        raise ValueError(f"{too_large} ({size})")
    return image


def _jpeg(data: bytes, height: int, width: int, channels: int, scale: int) -> Pixels | None:
    """`decode` by simplejpeg; None: not a valid JPEG of that size and colours, or not a scale that JPEG has."""
    if not data.startswith(JPEG_BEGINS) or LARGEST_JPEG_SCALE % scale:
        return None
    if channels == 1:
        stored_colours = "Gray"
        colours = "GRAY"
    else:
        stored_colours = "YCbCr"
        colours = "RGB"
    shape = (height // scale, width // scale, channels)
    try:
        if simplejpeg.decode_jpeg_header(data)[:3] != (height, width, stored_colours):
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(
            data, colours, min_height=shape[0], min_width=shape[1], min_factor=1
        )
    except ValueError:
        return None
    return pixels if pixels.shape == shape else None


def _raw(column: pa.Array, manifest: Manifest) -> Pixels:
    size = math.prod(manifest.shape)
    pixels = np.frombuffer(_bytes(column, 1), np.uint8, count=len(column) * size, offset=column.offset * size)
    return pixels.reshape(-1, *manifest.shape)


def _bytes(column: pa.Array, index: int) -> memoryview:
    """A buffer of a column without nulls: 1 is fixed-size values or offsets, 2 is values of any size."""
    buffer = column.buffers()[index]
    return memoryview(b"" if buffer is None else buffer)
