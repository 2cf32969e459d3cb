"""Bits/dim of many images: parts of the bound from several workers, and their scores.

Axes: N images.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ddpm.diffusion.likelihood import Bound
from ddpm.evaluation.scores import Score

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of some images, term by term; parts can be merged."""

    prior: Array
    """[N]."""
    kl: Array
    """[N]: the sum over t."""
    decoder: Array
    """[N]."""

    @classmethod
    def of(cls, bound: Bound) -> Self:
        return cls(bound.prior.numpy(), bound.kl.sum(1).numpy(), bound.decoder.numpy())

    @classmethod
    def merge(cls, *parts: Self) -> Self:
        """Concatenate the parts, in order."""
        terms = ("prior", "kl", "decoder")
        return cls(*(np.concatenate([getattr(part, term) for part in parts]) for term in terms))

    @property
    def total(self) -> Array:
        """[N]: the whole bound."""
        return self.prior + self.kl + self.decoder

    def scores(self) -> list[Score]:
        """The bound and its three terms, in bits/dim; the errors are over images, noise and t."""
        terms = {
            "bits/dim": self.total,
            "bits/dim-prior": self.prior,
            "bits/dim-kl": self.kl,
            "bits/dim-decoder": self.decoder,
        }
        n = len(self.prior)
        return [
            Score(name, float(v.mean()), float(v.std(ddof=1) / n**0.5) if n > 1 else float("nan"), n)
            for name, v in terms.items()
        ]
