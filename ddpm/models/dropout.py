"""Dropout whose masks are functions of keys: the same on any device, in a forward pass of any size, compiled or not.

nn.Dropout draws from torch's global generator, in the order of the elements of a pass. Here each image has a key for
each layer, two words of 32 bits, and the n-th element of the image in that layer is dropped if its hash is small:

    h = mix(key_0 + (2 key_1 + 1) mix(n)) as an int32,    dropped if h < p 2^32 - 2^31

A random odd factor is a universal hash (Dietzfelbinger et al. 1997, "A Reliable Randomized Algorithm for the
Closest-Pair Problem"), and mix is the finaliser of MurmurHash3 (Appleby 2011), a bijection in which each bit of the
input changes each bit of the output with a probability of about 1/2.

Axes: L layers, B images of a forward pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MURMUR3 = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)
"""The factors of MurmurHash3's 32-bit finaliser, as int32."""


class Dropout(nn.Module):
    """nn.Dropout with masks from keys, which `keyed` sets; in training without keys it raises a ValueError."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.key: Tensor | None = None  # [B, 2] int32

    def forward(self, x: Tensor) -> Tensor:
        """Drop each element of x, [B, ...], with probability p, and divide the others by 1 - p."""
        if self.p == 0 or not self.training:
            return x
        if self.key is None:
            raise ValueError("dropout has no keys; train inside dropout.keyed(...), or call net.eval()")
        dropped_below = int(self.p * 2**32) - 2**31
        kept = _hash(self.key, x) >= dropped_below
        return x * kept.to(x.dtype) * (1 / (1 - self.p))


def layers(net: nn.Module) -> list[Dropout]:
    """The layers of `net` that drop elements, in order.

    Raises:
        ValueError: the net has a layer of torch, whose masks would depend on the size of a pass.
    """
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Dropout) and layer.p > 0:
            raise ValueError(
                f"{name} is an nn.Dropout; its masks would not be reproducible: use ddpm.models.dropout"
            )
    return [layer for layer in net.modules() if isinstance(layer, Dropout) and layer.p > 0]


@contextmanager
def keyed(layers: Sequence[Dropout], keys: Iterable[Tensor]) -> Iterator[None]:
    """A context for one forward pass, with the masks of these keys.

    Args:
        layers: L layers, of `layers`.
        keys: [L, B, 2] int32, uniform over all 2^32 values: one for each layer and image.
    """
    for layer, key in zip(layers, keys, strict=True):
        layer.key = key
    try:
        yield
    finally:
        for layer in layers:
            layer.key = None


def _hash(key: Tensor, x: Tensor) -> Tensor:
    """The hash h of each element of x, [B, ...], in x's order of memory."""
    image = x[:1]
    number = torch.arange(image.numel(), dtype=torch.int32, device=x.device).view(image.shape)
    number = torch.empty_like(image, dtype=torch.int32).copy_(number)
    ones = [1] * (x.ndim - 1)
    offset, factor = key.view(-1, 2, *ones).unbind(1)
    return _mix(_mix(number) * (2 * factor + 1) + offset)


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's finaliser of int32 numbers, in place. Products wrap around; shifts are made logical by a mask."""
    for shift, factor in zip((16, 13), MURMUR3, strict=True):
        h ^= (h >> shift) & (2**32 - 1 >> shift)
        h *= factor
    h ^= (h >> 16) & 0xFFFF
    return h
