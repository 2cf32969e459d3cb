"""Bits/dim of many images: parts of the bound from several workers, and their scores.

Axes: N images, T timesteps.
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
    """The bound of some images, term by term, by index; parts can be merged."""

    index: NDArray[np.int64]
    """[N], ascending, none twice."""
    prior: Array
    """[N]."""
    kl: Array
    """[N]: the sum over t."""
    decoder: Array
    """[N]."""
    kl_at: Array
    """[T]: KL_t, summed over the images; 0 at t = 0."""

    @classmethod
    def of(cls, bound: Bound, start: int, num_timesteps: int) -> Self:
        """The bound of the images from index `start` on."""
        kl_at = np.zeros(num_timesteps)
        np.add.at(kl_at, bound.t.numpy(), bound.kl.numpy())
        index = np.arange(start, start + len(bound.prior))
        return cls(index, bound.prior.numpy(), bound.kl.sum(1).numpy(), bound.decoder.numpy(), kl_at)

    @classmethod
    def merge(cls, *parts: Self) -> Self:
        """All parts as one, in the order of the index.

        Raises:
            ValueError: an image is in two parts.
        """
        index = np.concatenate([part.index for part in parts])
        order = np.argsort(index)
        if (np.diff(index[order]) == 0).any():
            raise ValueError("an image is in two parts; its KL_t would count twice")
        prior, kl, decoder = (
            np.concatenate([getattr(part, term) for part in parts])[order]
            for term in ("prior", "kl", "decoder")
        )
        return cls(index[order], prior, kl, decoder, np.sum([part.kl_at for part in parts], axis=0))

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
        n = len(self.index)
        return [
            Score(name, float(v.mean()), float(v.std(ddof=1) / n**0.5) if n > 1 else float("nan"), n)
            for name, v in terms.items()
        ]
