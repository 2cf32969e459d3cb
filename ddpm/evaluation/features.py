"""Feature nets: they map images to vectors, and metrics compare sets of these vectors.

A metric depends on its features, so every score names its feature net. Features are computed from uint8 images, as
they are stored; floats are rounded and clipped first (`images.to_uint8`).

Axes: N images, H W height and width, C channels, F features.
"""

import hashlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.utils import images

Features = NDArray[np.float32]
"""[N, F], one row per image."""


class FeatureNet(Protocol):
    """A feature net; it may be sent to other processes."""

    name: str
    """Name in a score, such as "lite0"."""
    size: int
    """F."""
    digest: str
    """SHA-256 of everything that determines the features: weights and preprocessing."""

    def features(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, C] to float32 [N, F], on the device of `image`; ValueError for other images."""
        ...


def features_of(net: FeatureNet, image: Tensor, batch_size: int = 256) -> Features:
    """The features of uint8 [N, H, W, C]."""
    with torch.no_grad():
        return torch.cat([net.features(part).cpu().float() for part in image.split(batch_size)]).numpy()


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
