"""From the latents of an autoencoder to what is stored and what a net sees, and back.

Latents z have any mean and deviation. They are standardised by channel, clipped to +-limit deviations, and stored as
uint8, as images are. For a net, x_0 = x_0_max (stored / 127.5 - 1) with x_0_max = limit / 2, so that x_0 has a standard
deviation of 0.5, as images have (sigma_data of Karras et al. 2022, arXiv:2206.00364).

Axes: B images, C channels of a latent, H W height and width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.latents.autoencoder import Autoencoder
from ddpm.utils import images

STD = 0.5
"""The standard deviation of x_0."""
DECODED_AT_ONCE = 16
"""Latents decoded in one pass: the first layers of a decoder take the memory of the whole image in many channels."""


@dataclass(frozen=True)
class Scaling:
    """Mean and deviation of latents by channel, and the largest deviation that is stored."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    limit: float

    @property
    def x_0_max(self) -> float:
        """The largest x_0 of a net."""
        return STD * self.limit

    def to_uint8(self, z: Tensor) -> Tensor:
        """Latents [B, C, H, W] as they are stored, uint8 [B, H, W, C]."""
        return images.to_uint8(self._standardised(z) / self.limit)

    def from_uint8(self, stored: Tensor) -> Tensor:
        """The inverse of `to_uint8`, but for rounding and clipping."""
        return self.from_x_0(images.to_model(stored, self.x_0_max))

    def from_x_0(self, x_0: Tensor) -> Tensor:
        """Latents of a net's x_0 [B, C, H, W]."""
        return x_0 / STD * _by_channel(self.std, x_0) + _by_channel(self.mean, x_0)

    def clipped_share(self, z: Tensor) -> float:
        """The share of numbers that `to_uint8` clips."""
        return (self._standardised(z).abs() > self.limit).float().mean().item()

    def _standardised(self, z: Tensor) -> Tensor:
        return (z - _by_channel(self.mean, z)) / _by_channel(self.std, z)


@dataclass(frozen=True)
class Decoder:
    """Makes images of what a net generates."""

    autoencoder: Autoencoder
    scaling: Scaling

    @torch.no_grad()
    def images(self, x_0: Tensor) -> Tensor:
        """x_0 [B, C, H, W], or an x_t, as images, uint8 [B, H', W', 3] on the same device."""
        autoencoder = self.autoencoder.to(x_0.device)
        parts = x_0.float().split(DECODED_AT_ONCE)
        return torch.cat([images.to_uint8(autoencoder.decode(self.scaling.from_x_0(part))) for part in parts])


def _by_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
