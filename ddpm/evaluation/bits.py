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
    """The bound of some images, term by term; parts can be merged."""

    prior: Array
    """[N]."""
    kl: Array
    """[N]: the sum over t."""
    decoder: Array
    """[N]."""
    kl_at: Array
    """[T]: KL_t, summed over the images; 0 at t = 0."""

    @classmethod
    def of(cls, bound: Bound, num_timesteps: int) -> Self:
        kl_at = np.zeros(num_timesteps)
        np.add.at(kl_at, bound.t.numpy(), bound.kl.numpy())
        return cls(bound.prior.numpy(), bound.kl.sum(1).numpy(), bound.decoder.numpy(), kl_at)

    @classmethod
    def merge(cls, *parts: Self) -> Self:
        """All parts as one, in their order."""
        prior, kl, decoder = (
            np.concatenate([getattr(part, term) for part in parts]) for term in ("prior", "kl", "decoder")
        )
        return cls(prior, kl, decoder, np.sum([part.kl_at for part in parts], axis=0))

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
