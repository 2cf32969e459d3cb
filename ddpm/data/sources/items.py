"""A data set in Python as a source: of torch, of Hugging Face's `datasets`, a list. It needs no base class.

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

from ddpm.data.row_group import Labels, Pixels
from ddpm.data.sources.conversion import fitted
from ddpm.data.sources.sources import PARTS, InParts, by_part
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Items(InParts):
    """Images in Python, resized and cropped to squares; without a split "test", some are held out."""

    data: Any
    """A data set, or a mapping of them: {"train": ..., "test": ...}."""
    height: int = 32
    channels: int = 3
    test_images: int | None = None
    """Images that are held out as the split test; None: as of a folder."""
    seed: int = field(default=0, init=False)
    name: str = field(default="items", init=False)
    encoding: Literal["raw"] = field(default="raw", init=False)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The numbers of the classes; none if no item has a label."""
        largest = max(labels.max() for _, labels in self._parts.values())
        return tuple(str(label) for label in range(largest + 1))

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for part, (images, labels) in sorted(self._parts.items()):
            digest.update(part.encode())
            digest.update(images.tobytes())
            digest.update(labels.tobytes())
        return {"name": self.name, "height": self.height, "sha256": digest.hexdigest()}

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels, Labels | None]:
        part, rows = self._rows[split]
        images, labels = self._parts[part]
        chosen = rows[start:stop]
        return images[chosen], labels[chosen] if self.class_names else None

    @property
    def _part_sizes(self) -> dict[str, int]:
        return {part: len(labels) for part, (_, labels) in self._parts.items()}

    @cached_property
    def _parts(self) -> dict[str, tuple[Pixels, Labels]]:
        """The images of each part, and their labels; -1: an image has none."""
        named = self.data.items() if isinstance(self.data, Mapping) else [("train", self.data)]
        given = by_part(named, "data")
        if not given.keys() <= set(PARTS.values()):
            raise UserError(f"data has the splits {', '.join(given)}; use train, validation and test")
        parts = {}
        for part, data in given.items():
            items = self._items(part, data)
            images = np.stack([image for image, _ in items])
            parts[part] = (images, np.array([label for _, label in items], np.int64))
        has_label = np.concatenate([labels >= 0 for _, labels in parts.values()])
        if has_label.any() and not has_label.all():
            raise UserError(
                "data: some items have a label, others have none (None, or below 0); label all or none"
            )
        return parts

    def _items(self, part: str, data: Any) -> list[tuple[Pixels, int]]:
        size = len(data) if hasattr(data, "__len__") else 0
        if size == 0:
            raise UserError(
                f"data: {part} is {type(data).__name__}, without a length or any item; give items by number, or the "
                "URI of shards"
            )
        return [self._item(data, i) for i in range(size)]

    def _item(self, data: Any, row: int) -> tuple[Pixels, int]:
        """An image, and its label; -1: it has none."""
        try:
            image = data[row]
            label = None
            if isinstance(image, Mapping):
                label = image.get("label")
                image = image["img"] if "img" in image else image["image"]
            elif isinstance(image, tuple):
                image, label = image
            if not isinstance(image, Image.Image):
                image = _pillow(np.asarray(image))
            pixels = np.asarray(fitted(image, self.height, self.channels), np.uint8)
            number = -1 if label is None else operator.index(label)
            return pixels.reshape(self.height, self.height, -1), number
        except Exception as error:  # the data set's own, or the item is not an image
            raise UserError(f"data: item {row}: {' '.join(str(error).split())}") from error


def _pillow(pixels: NDArray[Any]) -> Image.Image:
    """An array of one image as Pillow's."""
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"it is {pixels.dtype} {pixels.shape}; an image is uint8, or floats from 0 to 1")
    if pixels.shape[2:] == (1,):
        pixels = pixels.squeeze(2)
    return Image.fromarray(pixels)
