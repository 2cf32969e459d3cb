"""Writing of generated images to a folder or bucket, and which of them are missing there.

    request.json           everything that determines the images, written first; another request is refused
    images/000000.png ...
    grid.png               the first 64

A file is complete or absent, so after a crash existing images need not be sampled again.

Axes: N images, H W, C channels.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ddpm.config.json import differences
from ddpm.runs.storage import Location
from ddpm.utils import images, strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.images import Pixels

REQUEST = "request.json"
GRID = "grid.png"
GRID_IMAGES = 64
IMAGES = "images"
RESERVED_NAMES = (IMAGES, GRID)
"""Names that make a folder without a request.json unusable: its images are unknown."""
NAME = re.compile(r"[0-9]{6}\.png|[1-9][0-9]{6,}\.png")


def begin(location: Location, request: Mapping[str, Any]) -> None:
    """Write the request at `location`, or check that it is the same as before.

    Args:
        request: everything that determines the images, as flat JSON.
    """
    note = location.child(REQUEST)
    text = json.dumps(request, indent=2) + "\n"
    location.sweep()
    if not note.exists():
        if taken := [name for name in RESERVED_NAMES if location.child(name).exists()]:
            raise UserError(
                f"{location.uri} has {taken[0]} but no {REQUEST}, so it is unknown which images it holds; use another "
                "--out"
            )
        note.write(text.encode())
        return
    before = strict_json.parse(dict[str, Any], note.read(), f"{note.uri} is damaged; use another --out")
    if changed := differences(before, json.loads(text)):
        raise UserError(
            f"{location.uri} holds images of another request: {changed}; use those values, or another --out"
        )


class PngWriter:
    """One PNG per image; a larger num_images adds to them."""

    num_kept: int
    """Images of the pieces that were complete at the start."""

    def __init__(
        self,
        location: Location,
        num_images: int,
        batch_size: int,
        grid: Callable[[Pixels], Pixels] = images.grid,
    ) -> None:
        self._location = location
        self._grid = grid
        self._num_images = num_images
        self._size = batch_size
        self._images = location.child(IMAGES)
        self._images.sweep()
        numbers = (int(name[:-4]) for name in self._images.files() if NAME.fullmatch(name))
        counts = Counter(i // batch_size for i in numbers if i < num_images)
        # A piece has batch_size images, the last one perhaps fewer.
        self._whole = {k for k, n in counts.items() if n == min(batch_size, num_images - k * batch_size)}
        self.num_kept = sum(counts[k] for k in self._whole)

    def missing(self, piece: range) -> bool:
        """Whether an image of the piece was missing at the start."""
        return piece.start // self._size not in self._whole

    def write(self, piece: range, pixels: Pixels) -> None:
        """Store the images with these indices, uint8 [N, H, W, C]."""
        for i, image in zip(piece, pixels, strict=True):
            self._images.child(_name(i)).write(images.png_bytes(image))

    def close(self) -> None:
        """Write the grid, after the last image."""
        first = range(min(self._num_images, GRID_IMAGES))
        pixels = [images.from_png(self._images.child(_name(i)).read()) for i in first]
        self._location.child(GRID).write(images.png_bytes(self._grid(np.stack(pixels))))


def _name(i: int) -> str:
    return f"{i:06d}.png"
