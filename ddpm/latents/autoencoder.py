"""What an autoencoder is, and how one is loaded.

    encode  images x [B, 3, H, W] in [-1, 1] to latents z [B, C, H / factor, W / factor]
    decode  latents to images, which may leave [-1, 1]

An autoencoder is trained before, by others. Its kind (`config.kinds.AUTOENCODERS`) loads it from a folder of weights;
whether it scales its latents does not matter, since `scaling.Scaling` measures them.

Axes: B images, C channels of a latent, H W height and width.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ddpm.config import kinds
from ddpm.utils.errors import UserError

FIELD = "data.autoencoder"
PROBED_SIDE = 64
"""Side of the image that is encoded to learn the shape of latents."""


class Autoencoder(Protocol):
    """Interface of an autoencoder; it may be sent to other processes."""

    digest: str
    """SHA-256 of everything that determines its latents and images: configuration and weights."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents of images [B, 3, H, W] float32 in [-1, 1], without noise: the mean where there is a distribution."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, 3, H, W] of latents."""
        ...

    def save(self, folder: Path) -> None:
        """Write what the kind loads into this folder, which exists."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move the weights to a device; returns the autoencoder."""
        ...


class Shape(NamedTuple):
    """The shape of latents."""

    channels: int
    factor: int
    """An image's side divided by a latent's."""

    def side(self, image_size: int) -> int:
        """The side of the latents of images of that side; UserError if the factor does not divide it."""
        if image_size % self.factor:
            below = image_size // self.factor * self.factor
            raise UserError(
                f"the autoencoder divides the side of images by {self.factor}, and {image_size} is no multiple of it; "
                f"use {' or '.join(str(side) for side in (below, below + self.factor) if side)}"
            )
        return image_size // self.factor


def load(name: str) -> Autoencoder:
    """The autoencoder KIND:WEIGHTS, such as "diffusers:FOLDER"."""
    kind, colon, weights = name.partition(":")
    if not colon or not weights:
        raise UserError(f"the autoencoder is {name!r}; it must be KIND:WEIGHTS, such as diffusers:FOLDER")
    return load_kind(kind, weights)


def load_kind(kind: str, weights: str) -> Autoencoder:
    """The autoencoder of a kind, from its folder of weights, or from what else the kind takes."""
    return cast(Autoencoder, kinds.find(FIELD, kind).load()(weights))


@torch.no_grad()
def shape_of(autoencoder: Autoencoder) -> Shape:
    """The shape of its latents, from encoding one empty image."""
    z = autoencoder.encode(torch.zeros(1, 3, PROBED_SIDE, PROBED_SIDE))
    _, channels, height, width = z.shape
    if height != width or PROBED_SIDE % height:
        raise UserError(
            f"the autoencoder makes latents of {height}x{width} from images of {PROBED_SIDE}x{PROBED_SIDE}; the side "
            "must be divided by a whole number"
        )
    return Shape(channels, PROBED_SIDE // height)
