"""PNG files of images, uint8 [H, W, C], C = 1 (grey) or 3 (RGB); without PyTorch, as the MLflow callback is."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def png_bytes(array: Pixels) -> bytes:
    """uint8 [H, W, C], C 1 or 3, as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "PNG")
    return file.getvalue()


def from_png(data: bytes) -> Pixels:
    """The inverse of `png_bytes`."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.atleast_3d(np.asarray(image, np.uint8))
