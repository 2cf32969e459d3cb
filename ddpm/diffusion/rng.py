"""The interface of random number generators, which objectives and samplers draw from."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Rng(Protocol):
    """A random number generator. Each call draws the next numbers, on the device where they are needed."""

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers."""
        ...

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1)."""
        ...

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Uniform whole numbers in 0..high-1, int64."""
        ...
