"""What a feature net is: images in, vectors out, by which sets of images are compared.

A number is worth no more than the features it was computed from, so every score carries their name. Images are
judged as they would be stored, as uint8; whoever has floats rounds and clips them first (`images.to_uint8`).

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
    """A net that features are taken from; it may be sent to other processes."""

    name: str
    """As it appears in a score: "lite0"."""
    size: int
    """F."""
    digest: str
    """SHA-256 of all that decides the features: weights, and how images are brought to them."""

    def features(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, C] to float32 [N, F], on the device of `image`.

        Raises:
            ValueError: the images are not uint8.
        """
        ...


@dataclass(frozen=True)
class Features:
    """The features of some images, each under the index it was drawn or stored with.

    Parts that several workers computed make the whole that one would have computed.
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
        """All of them in the order of their index; what is there twice is taken once."""
        index, first = np.unique(np.concatenate([part.index for part in parts]), return_index=True)
        return cls(index, np.concatenate([part.values for part in parts])[first])


def features_of(net: FeatureNet, image: Tensor, start: int = 0, batch_size: int = 256) -> Features:
    """The features of uint8 [N, H, W, C], of which the first has index `start`."""
    with torch.no_grad():
        values = [net.features(part).cpu().float() for part in image.split(batch_size)]
    return Features(np.arange(start, start + len(image)), torch.cat(values).numpy())


def rgb(image: Tensor) -> Tensor:
    """uint8 [N, H, W, C] to float32 [N, 3, H, W] in [-1, 1]; grey becomes three equal channels."""
    return images.to_model(image).expand(-1, 3, -1, -1)


def normalised(values: Tensor) -> Tensor:
    """Each of [N, F] scaled to the length sqrt(F), so that KID's kernel sees products about 1 whatever the net."""
    return torch.nn.functional.normalize(values.float(), dim=1) * values.shape[1] ** 0.5


def digest_of(tensors: Mapping[str, Tensor], recipe: str = "") -> str:
    """SHA-256 of names, shapes, types and bytes, and of `recipe`, which says what is done with them."""
    digest = hashlib.sha256(recipe.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
