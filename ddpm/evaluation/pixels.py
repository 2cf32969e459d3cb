"""The pixels themselves as features, without a net; they say little about the content of an image."""

import hashlib

from torch import Tensor

from ddpm.utils import images


class Pixels:
    """F = C H W grey levels in [-1, 1].

    Args:
        shape: (H, W, C).
    """

    name = "pixels"

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape, self.size = shape, shape[0] * shape[1] * shape[2]
        self.digest = hashlib.sha256(f"pixels {shape}".encode()).hexdigest()

    def features(self, image: Tensor) -> Tensor:
        return images.to_model(image).flatten(1)
