"""Feature nets: from images to vectors, by which sets of images are compared.

A metric depends on its features, so every score carries the name of its feature net. Features are taken from uint8
images, as they are stored; floats are rounded and clipped first (`images.to_uint8`).

Axes: N images, H W height and width, C channels, F features.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.utils import images


class FeatureNet(Protocol):
    """A feature net; it may be sent to other processes."""

    name: str
    """Name in a score, such as "lite0"."""
    size: int
    """F."""
    digest: str
    """SHA-256 of everything that determines the features: weights and preprocessing."""

    def features(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, C] to float32 [N, F], on the device of `image`.

        Raises:
            ValueError: the images are not uint8.
        """
        ...


@dataclass(frozen=True)
class Features:
    """The features of some images, by their index.

    Parts from several workers merge to the features that one worker would have computed.
    """

    index: NDArray[np.int64]
    """[N], ascending, none twice."""
    values: NDArray[np.float32]
    """[N, F]."""

    def __post_init__(self) -> None:
        if self.index.shape != self.values.shape[:1] or (np.diff(self.index) <= 0).any():
            raise ValueError("index must be ascending, with one entry for each row of values")

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def merge(cls, *parts: Self) -> Self:
        """All parts as one, in the order of the index; duplicates are taken once."""
        index, first = np.unique(np.concatenate([part.index for part in parts]), return_index=True)
        return cls(index, np.concatenate([part.values for part in parts])[first])


def features_of(net: FeatureNet, image: Tensor, start: int = 0, batch_size: int = 256) -> Features:
    """The features of uint8 [N, H, W, C]; the first image has index `start`."""
    with torch.no_grad():
        values = [net.features(part).cpu().float() for part in image.split(batch_size)]
    return Features(np.arange(start, start + len(image)), torch.cat(values).numpy())


def rgb(image: Tensor) -> Tensor:
    """uint8 [N, H, W, C] to float32 [N, 3, H, W] in [-1, 1]; grey becomes three equal channels."""
    return images.to_model(image).expand(-1, 3, -1, -1)


def normalised(values: Tensor) -> Tensor:
    """Rows of [N, F] scaled to the length sqrt(F), so that KID's kernel sees products of about 1 for any net."""
    return torch.nn.functional.normalize(values.float(), dim=1) * values.shape[1] ** 0.5


def digest_of(tensors: Mapping[str, Tensor], recipe: str = "") -> str:
    """SHA-256 of names, shapes, types and bytes, and of `recipe`, the version of their use."""
    digest = hashlib.sha256(recipe.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
