"""Images in and out: uint8 <-> x_0, grids, strips, PNG and GIF.

An image outside the net is uint8 [N, H, W, C], C = 1 (grey) or 3 (RGB). The net sees float32
[N, C, H, W] in [-1, 1]; the latents of an autoencoder have other C, and a range of their own. Grids
for viewing are RGB, enlarged by nearest neighbour so that 8x8 digits are visible.

Axes: N or B images, F frames, H W height and width, C channels.
"""

import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]

PADDING = 2
"""Pixels between tiles and around them."""
BACKGROUND = 255
MIN_SIDE = 48
"""Tiles are enlarged by the smallest whole factor that makes their shorter side at least this long."""
CREATION_TIME = "Creation Time"
"""PNG's keyword for the time at which an image was made."""
FRAME_MS = 80
"""Milliseconds that a GIF shows a frame; the format counts in hundredths of a second."""


def to_model(image: Tensor, x_0_max: float = 1.0) -> Tensor:
    """uint8 [B, H, W, C] in 0..255 to float32 [B, C, H, W] in [-x_0_max, x_0_max].

    x = x_0_max (image / 127.5 - 1). The result keeps the order of the bytes, which is torch's channels_last.
    """
    if image.dtype != torch.uint8 or image.ndim != 4:
        raise ValueError(f"image is {image.dtype} {tuple(image.shape)}; it must be uint8 [B, H, W, C]")
    x = image.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
    return x if x_0_max == 1 else x_0_max * x


def to_uint8(x: Tensor) -> Tensor:
    """float [B, C, H, W] to uint8 [B, H, W, C]: -1 becomes 0, 1 becomes 255; rounded and clipped.

    The exact inverse of `to_model` for all 256 values. (A bare cast would truncate, darkening by half
    a level, and wrap around outside [-1, 1].)
    """
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def grid(images: Pixels, columns: int | None = None, captions: Sequence[str] = ()) -> Pixels:
    """Arrange images as tiles of one RGB image, row by row.

    Args:
        images: uint8 [N, H, W, C], C 1 or 3, N at least 1.
        columns: tiles per row; None makes the grid about square. Empty places in the last row are white.
        captions: one per column, written above it and cut off at its width; empty for no captions.

    Returns:
        uint8 [H', W', 3].
    """
    tiles = _rgb(images)
    factor = max(1, math.ceil(MIN_SIDE / min(tiles.shape[1:3])))
    tiles = tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    if columns is None:
        columns = math.ceil(math.sqrt(len(tiles)))
    height = tiles.shape[1] + PADDING
    width = tiles.shape[2] + PADDING
    rows = math.ceil(len(tiles) / columns)
    picture = np.full((rows * height + PADDING, columns * width + PADDING, 3), BACKGROUND, np.uint8)
    for i, tile in enumerate(tiles):
        top = i // columns * height + PADDING
        left = i % columns * width + PADDING
        picture[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    if not captions:
        return picture
    return np.concatenate([_header(captions, width), picture])


def strip(rows: Sequence[Pixels], captions: Sequence[str] = ()) -> Pixels:
    """Rows of frames, one below the other: trajectories, or images beside their reconstructions.

    Args:
        rows: each uint8 [F, H, W, C], all of the same shape.
        captions: one per column, written above it; empty for no captions.

    Returns:
        uint8 [H', W', 3].
    """
    return grid(np.concatenate(rows), len(rows[0]), captions)


def png_bytes(array: Pixels, time_ms: int | None = None) -> bytes:
    """uint8 [H, W, C], C 1 or 3, as a PNG file.

    Args:
        time_ms: the time to keep in the file, in milliseconds since 1970; None: no time, equal images are equal files.
    """
    about = PngInfo()
    if time_ms is not None:
        moment = datetime.fromtimestamp(time_ms / 1000, UTC)
        about.add_text(CREATION_TIME, moment.isoformat(timespec="milliseconds"))
    file = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "PNG", pnginfo=about)
    return file.getvalue()


def time_ms_of(data: bytes) -> int | None:
    """The time that `png_bytes` kept in a PNG file; None: it has none."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        text = image.text.get(CREATION_TIME)  # type: ignore[attr-defined]
    try:
        return None if text is None else round(datetime.fromisoformat(text).timestamp() * 1000)
    except ValueError:
        return None


def from_png(data: bytes) -> Pixels:
    """The inverse of `png_bytes`."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.atleast_3d(np.asarray(image, np.uint8))


def figure_png(figure: "Figure") -> bytes:
    """A figure of matplotlib as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def gif_bytes(frames: Sequence[Pixels]) -> bytes:
    """Frames uint8 [H, W, C] of one size, at least one, as a GIF that loops forever, with 256 colours a frame."""
    pictures = [Image.fromarray(frame) for frame in _rgb(np.stack(frames))]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=FRAME_MS, loop=0)
    return file.getvalue()


def _header(captions: Sequence[str], width: int) -> Pixels:
    """Captions beside each other, each `width` pixels wide."""
    height = 14
    header = Image.new("RGB", (len(captions) * width + PADDING, height), (BACKGROUND,) * 3)
    font = ImageFont.load_default(size=10)
    for i, caption in enumerate(captions):
        cell = Image.new("RGB", (width, height), (BACKGROUND,) * 3)
        ImageDraw.Draw(cell).text((0, 1), caption, fill=(0, 0, 0), font=font)
        header.paste(cell, (PADDING + i * width, 0))
    return np.asarray(header, np.uint8)


def _rgb(images: Pixels) -> Pixels:
    """Convert [N, H, W, 1 or 3] to [N, H, W, 3], N at least 1."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0:
        got = f"{images.dtype} {images.shape}"
        raise ValueError(f"images are {got}; they must be uint8 [N, H, W, C], N at least 1, C 1 or 3")
    return np.broadcast_to(images, (*images.shape[:3], 3))
