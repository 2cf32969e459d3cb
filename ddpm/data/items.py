"""A data set that Python holds, as a source: torch's, Hugging Face's, a list. Nothing needs to be subclassed.

It has a length, and items by number: an image, (image, label), or a dict with "image" (or "img") and perhaps "label".
An image is Pillow's, or an array or tensor [H, W], [H, W, C] or [C, H, W], uint8 or floats from 0 to 1. All images are
held in memory at the net's size.
"""

import hashlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm.data.image_folder import PARTS, fitted
from ddpm.data.row_group import Labels, Pixels
from ddpm.data.sources import Loaded, divide
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Items(Loaded):
    """Images in Python, resized and cropped to squares; without a split "test", 5 % are held out."""

    data: Any
    """A data set, or a mapping of them: {"train": ..., "test": ...}."""
    height: int = 32
    channels: int = 3
    name: str = field(default="items", init=False)
    encoding: Literal["raw"] = field(default="raw", init=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(max(max(labels) for _, labels in self._images.values()) + 1)))

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(b"".join(part.tobytes() for both in self._images.values() for part in both))
        return {"name": self.name, "height": self.height, "sha256": digest.hexdigest()}

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels, Labels | None]:
        images, labels = self._images[split]
        return images[start:stop], labels[start:stop] if self.class_names else None

    @cached_property
    def _images(self) -> dict[str, tuple[Pixels, Labels]]:
        parts = self.data if isinstance(self.data, Mapping) else {"train": self.data}
        if "train" not in parts or len({PARTS.get(part) for part in parts} - {None}) < len(parts):
            raise UserError(f"data has the splits {', '.join(map(str, parts))}; use train and test")
        items = {PARTS[part]: self._items(part, data) for part, data in parts.items()}
        found = [label for of_part in items.values() for _, label in of_part]
        if min(found) < 0 <= max(found):
            raise UserError(
                "data: some items have a label, others have none (None, or below 0); label all or none"
            )
        splits = divide({part: len(of_part) for part, of_part in items.items()}, seed=0)
        ordered = {
            split: zip(*(items[part][i] for i in rows), strict=True) for split, (part, rows) in splits.items()
        }
        return {split: (np.array(images), np.array(labels)) for split, (images, labels) in ordered.items()}

    def _items(self, part: str, data: Any) -> list[tuple[Pixels, int]]:
        size = len(data) if hasattr(data, "__len__") else 0
        if size == 0:
            what = f"{part} is {type(data).__name__}, without a length or any item"
            raise UserError(f"data: {what}; give items by number, or the URI of shards")
        return [self._item(data, i) for i in range(size)]

    def _item(self, data: Any, row: int) -> tuple[Pixels, int]:
        """An image, and its label; -1: it has none."""
        try:
            item, label = data[row], None
            if isinstance(item, Mapping):
                item, label = item["img" if "img" in item else "image"], item.get("label")
            elif isinstance(item, tuple):
                item, label = item
            image = item if isinstance(item, Image.Image) else _pillow(np.asarray(item))
            pixels = np.asarray(fitted(image, self.height, self.channels), np.uint8)
            label = -1 if label is None else operator.index(label)
            return pixels.reshape(self.height, self.height, -1), label
        except Exception as error:  # of the data set, or since it is no such item
            raise UserError(f"data: item {row}: {' '.join(str(error).split())}") from error


def _pillow(pixels: NDArray[Any]) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"it is {pixels.dtype} {pixels.shape}; an image is uint8, or floats from 0 to 1")
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels)
