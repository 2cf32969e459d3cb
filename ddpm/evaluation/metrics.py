"""How far two sets of images are apart, from their features. All in float64.

A metric is biased by the number of images (FID: upward, KID not), so it means something beside that of real images
against real images at the same number (`scores`).

Papers:
    FID                  Heusel et al. 2017, arXiv:1706.08500
    KID                  Binkowski et al. 2018, arXiv:1801.01401
    precision, recall    Kynkaanniemi et al. 2019, arXiv:1904.06991
    density, coverage    Naeem et al. 2020, arXiv:2002.09797

Axes: N generated images, M real images, F features.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BLOCK = 1024
"""Rows of a kernel matrix at a time."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of features: all that FID asks for, and the same from parts as from the whole."""

    n: int
    mean: Array
    """[F]."""
    scatter: Array
    """[F, F]: the sum of (x - mean)(x - mean)^T."""

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Self:
        """Of [N, F], N at least 1."""
        x = np.asarray(features, np.float64)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    @classmethod
    def merge(cls, *parts: Self) -> Self:
        """Of all their images, to rounding. Chan et al. 1983, Eq. 2.1."""
        n = sum(part.n for part in parts)
        mean = sum((part.n * part.mean for part in parts), np.zeros_like(parts[0].mean)) / n
        scatter = np.zeros_like(parts[0].scatter)
        for part in parts:
            scatter += part.scatter + part.n * np.outer(part.mean - mean, part.mean - mean)
        return cls(n, mean, scatter)

    @property
    def covariance(self) -> Array:
        """[F, F], unbiased.

        Raises:
            ValueError: of one image alone.
        """
        if self.n < 2:
            raise ValueError("n is 1; a covariance takes at least 2 images")
        return self.scatter / (self.n - 1)


def fid(a: Moments, b: Moments) -> float:
    """The Frechet distance of two Gaussians, |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: it
    stays real and exact where covariances are singular.

    Source: Heusel et al. 2017, Eq. 6.
    """
    root = _root(a.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    means = np.sum((a.mean - b.mean) ** 2)
    cross = np.sqrt(eigenvalues.clip(min=0)).sum()
    return float(means + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


class Estimate(NamedTuple):
    """A number and how uncertain it is."""

    value: float
    error: float
    """Standard error."""


def kid(generated: NDArray[np.floating], real: NDArray[np.floating]) -> Estimate:
    """The unbiased squared MMD with the kernel (x y / F + 1)^3, from all pairs; it may be negative.

    The standard error is the jackknife's over the generated images, the real ones held fixed, as between models that
    are compared on the same real images. It is not too small on average (Efron & Stein 1981).

    Args:
        generated: [N, F], N at least 3.
        real: [M, F], M at least 2.

    Raises:
        ValueError: there are fewer.

    Source: Binkowski et al. 2018, Eqs. 3 and 4.
    """
    n, m = len(generated), len(real)
    if n < 3 or m < 2:
        raise ValueError(f"there are {n} generated and {m} real images; KID takes at least 3 and 2")
    x, y = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    to_own, to_real = _kernel_sums(x, x, own=True), _kernel_sums(x, y)
    real_part = _kernel_sums(y, y, own=True).sum() / (m * (m - 1))
    value = to_own.sum() / (n * (n - 1)) + real_part - 2 * to_real.sum() / (n * m)
    without = (to_own.sum() - 2 * to_own) / ((n - 1) * (n - 2)) + real_part
    without -= 2 * (to_real.sum() - to_real) / ((n - 1) * m)
    return Estimate(float(value), jackknife_error(without))


class Manifold(NamedTuple):
    """How well generated images lie among real ones, and the other way round; each at least 0."""

    precision: float
    """Share of generated images inside the ball of a real one."""
    recall: float
    """Share of real images inside the ball of a generated one."""
    density: float
    """Balls of real images that a generated one lies in, on average, per k; 1 where the sets are alike."""
    coverage: float
    """Share of real images with a generated one in their ball."""


class Distances:
    """What `Manifold` is computed from, kept so that it can be computed without some of the generated images.

    An image's ball reaches to its k-th nearest neighbour of its own set.

    Args:
        generated: [N, F].
        real: [M, F], M above 5.
    """

    K_PRECISION = 3
    """Kynkaanniemi et al. 2019."""
    K_DENSITY = 5
    """Naeem et al. 2020."""

    def __init__(self, generated: NDArray[np.floating], real: NDArray[np.floating]) -> None:
        self._own = _distances(generated, generated)  # [N, N]
        self._to_real = _distances(generated, real)  # [N, M]
        of_real = _distances(real, real)
        self._precision_radius = _radius(of_real, self.K_PRECISION)
        self._density_radius = _radius(of_real, self.K_DENSITY)

    def manifold(self, rows: NDArray[np.int64] | None = None) -> Manifold:
        """Of the generated images in these rows; None: of all. There must be more than 3."""
        own = self._own if rows is None else self._own[np.ix_(rows, rows)]
        to_real = self._to_real if rows is None else self._to_real[rows]
        inside = to_real <= self._density_radius
        return Manifold(
            precision=float((to_real <= self._precision_radius).any(1).mean()),
            recall=float((to_real <= _radius(own, self.K_PRECISION)[:, None]).any(0).mean()),
            density=float(inside.sum(1).mean() / self.K_DENSITY),
            coverage=float(inside.any(0).mean()),
        )


def jackknife_error(without: NDArray[np.float64]) -> float:
    """The standard error of an estimate, from its values without each of G groups in turn, [G]."""
    groups = len(without)
    return float(np.sqrt((groups - 1) / groups * np.sum((without - without.mean()) ** 2)))


def projection(size: int, target: int, seed: int = 0) -> Array:
    """[size, target]: onto a random subspace, orthonormal; FID of many features needs as many images or fewer
    features."""
    # RandomState, since numpy promises its streams for ever. FID does not depend on the basis of the subspace.
    q, _ = np.linalg.qr(np.random.RandomState(seed).standard_normal((size, target)))
    return q


def _root(matrix: Array) -> Array:
    """The symmetric root of a covariance."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T


def _kernel_sums(x: Array, y: Array, own: bool = False) -> Array:
    """For each of x, the sum of its kernel with all of y; `own`: y is x, and no image counts with itself."""
    sums = np.empty(len(x))
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        sums[rows] = ((x[rows] @ y.T / x.shape[1] + 1) ** 3).sum(1)
    return sums - ((x * x).sum(1) / x.shape[1] + 1) ** 3 if own else sums


def _distances(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float32]:
    from sklearn.metrics.pairwise import euclidean_distances  # takes seconds to import

    # Computed in float64, kept in float32: there are N^2 of them.
    return euclidean_distances(np.asarray(x, np.float64), np.asarray(y, np.float64)).astype(np.float32)


def _radius(own: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """[N]: the distance of each image to its k-th nearest other one; of [N, N], with 0 from itself to itself."""
    if len(own) <= k:
        raise ValueError(f"there are {len(own)} images; a {k}-th neighbour takes at least {k + 1}")
    return np.partition(own, k, axis=1)[:, k]
