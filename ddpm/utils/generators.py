"""Random generators of tensors, keyed by counters (`seeding`).

On CPUs NumPy's Philox uses all 128 bits of the key; PyTorch's generator there keeps 32 bits of a seed, so that two of
65,536 images are likely to be the same. RandomState draws the numbers from Philox because NumPy has frozen its streams:
the next version draws the same image. On GPUs PyTorch's generator, a Philox as well, keeps 64 bits.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ddpm.utils.seeding import key, torch_seed

if TYPE_CHECKING:
    from ddpm.diffusion.rng import Rng

CPU = torch.device("cpu")
FLOAT32_BITS = 24
"""Bits of a uniform number: those that a float32 in [0, 1) holds."""


class PhiloxGenerator:
    """Philox4x64-10 under a 128-bit key (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3).

    Numbers are drawn on the CPU.

    Args:
        counters: the key; all of them determine the stream.
        device: where the numbers are needed.
    """

    def __init__(self, *counters: int, device: torch.device = CPU) -> None:
        self._random = np.random.RandomState(np.random.Philox(key=key(*counters)))
        self._device = device

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(self._random.standard_normal(tuple(shape))).to(dtype).to(self._device)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        whole = torch.from_numpy(self._random.randint(2**FLOAT32_BITS, size=tuple(shape), dtype=np.int64))
        return (whole.to(dtype) / 2**FLOAT32_BITS).to(self._device)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._random.randint(high, size=tuple(shape), dtype=np.int64)).to(
            self._device
        )


class TorchGenerator:
    """PyTorch's generator of a GPU, seeded with 64 bits; numbers are drawn on the GPU."""

    def __init__(self, *counters: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(torch_seed(*counters))
        self._device = device

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(tuple(shape), generator=self._generator, device=self._device, dtype=dtype)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(tuple(shape), generator=self._generator, device=self._device, dtype=dtype)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(high, tuple(shape), generator=self._generator, device=self._device)


class PerMicroBatch:
    """Draws for several micro-batches at once: each has its own generator, so its numbers do not depend on the others.

    Args:
        generators: one per micro-batch, in order.
        size: images of a micro-batch.
        rows: the images that need numbers, among those of the micro-batches. All micro-batches are drawn whole, so an
            image's numbers do not depend on the others.
    """

    def __init__(self, generators: "Sequence[Rng]", size: int, rows: slice = slice(None)) -> None:
        self._generators = generators
        self._size = size
        self._rows = rows

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._cut([own.normal([self._size, *shape[1:]], dtype) for own in self._generators], shape)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._cut([own.uniform([self._size, *shape[1:]], dtype) for own in self._generators], shape)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        return self._cut([own.integers(high, [self._size, *shape[1:]]) for own in self._generators], shape)

    def _cut(self, numbers: list[Tensor], shape: Sequence[int]) -> Tensor:
        kept = torch.cat(numbers)[self._rows]
        assert len(kept) == shape[0], "the first axis is that of the images"
        return kept


def generator(device: torch.device, *counters: int) -> "Rng":
    """A generator for `device`; its stream depends only on the counters and on whether `device` is a CPU."""
    kind = PhiloxGenerator if device.type == "cpu" else TorchGenerator
    return kind(*counters, device=device)
