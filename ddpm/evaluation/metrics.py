"""Metrics of two sets of images, from their features. All in float64.

The number of images biases a metric (FID upward, KID not), so compare it with that of real images against real images
at the same number (feature_scores.py).

Papers:
    FID                  Heusel et al. 2017, arXiv:1706.08500
    KID                  Binkowski et al. 2018, arXiv:1801.01401
    precision, recall    Kynkaanniemi et al. 2019, arXiv:1904.06991

Axes: N generated images, M real images, F features.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ddpm.evaluation.jackknife import jackknife_error, strata

Array = NDArray[np.float64]

BLOCK = 1024
"""Rows of a kernel matrix at a time."""


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features: all that FID needs."""

    mean: Array
    """[F]."""
    covariance: Array
    """[F, F], unbiased."""

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Self:
        """The moments of [N, F], N at least 2."""
        x = np.asarray(features, np.float64)
        return cls(x.mean(axis=0), np.cov(x, rowvar=False))

    @cached_property
    def root(self) -> Array:
        """[F, F], the symmetric root of the covariance; cached, since the jackknife uses it repeatedly."""
        eigenvalues, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T


def fid(a: Moments, b: Moments) -> float:
    """The Frechet distance of two Gaussians, |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: it
    stays real and exact where covariances are singular. scipy.linalg.sqrtm(A B) takes four times as long with 128
    features, and is complex where they are singular.

    Source: Heusel et al. 2017, Eq. 6.
    """
    eigenvalues = np.linalg.eigvalsh(a.root @ b.covariance @ a.root)
    means = np.sum((a.mean - b.mean) ** 2)
    cross = np.sqrt(eigenvalues.clip(min=0)).sum()
    return float(means + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


class Estimate(NamedTuple):
    """A number and its uncertainty."""

    value: float
    error: float
    """Standard error."""


def kid(
    generated: NDArray[np.floating], real: NDArray[np.floating], label: NDArray[np.int64] | None = None
) -> Estimate:
    """The unbiased squared MMD with the kernel (x y / F + 1)^3, from all pairs; it may be negative.

    The standard error is the jackknife's (jackknife.py), without each generated and each real image in turn. It is
    about sqrt(2) times too large where the sets are alike.

    Args:
        generated: [N, F], N at least 3.
        real: [M, F], M at least 3.
        label: [N], the requested classes, which redrawn images would share. None: no classes.

    Source: Binkowski et al. 2018, Eqs. 3 and 4.
    """
    n = len(generated)
    m = len(real)
    if min(n, m) < 3:
        raise ValueError(f"there are {n} generated and {m} real images; KID needs at least 3 of each")
    x = np.asarray(generated, np.float64)
    y = np.asarray(real, np.float64)
    x_to_x = _kernel_sums(x, x, own=True)
    y_to_y = _kernel_sums(y, y, own=True)
    x_to_y = _kernel_sums(x, y)
    y_to_x = _kernel_sums(y, x)
    value = x_to_x.sum() / (n * (n - 1)) + y_to_y.sum() / (m * (m - 1)) - 2 * x_to_y.sum() / (n * m)
    without_x = _without_each(x_to_x, x_to_y, m)
    without_y = _without_each(y_to_y, y_to_x, n)
    of_class = [without_x[rows] for rows in strata(n, label)]
    return Estimate(float(value), float(jackknife_error(*of_class, without_y)))


class Manifold(NamedTuple):
    """Overlap of generated and real images; each number is at least 0."""

    precision: float
    """Share of generated images inside the ball of a real one."""
    recall: float
    """Share of real images inside the ball of a generated one."""


class Distances:
    """Pairwise distances for `Manifold`, which can be computed without some of the images of either set.

    An image's ball reaches to its k-th nearest neighbour in its own set.

    Args:
        generated: [N, F].
        real: [M, F], M above 3.
    """

    K = 3
    """Kynkaanniemi et al. 2019."""

    def __init__(self, generated: NDArray[np.floating], real: NDArray[np.floating]) -> None:
        self._own = _distances(generated, generated)  # [N, N]
        self._to_real = _distances(generated, real)  # [N, M]
        self._of_real = _distances(real, real)  # [M, M]
        self._own_radii = _radii(self._own, self.K)
        self._real_radii = _radii(self._of_real, self.K)

    def manifold(
        self, rows: NDArray[np.int64] | None = None, real_rows: NDArray[np.int64] | None = None
    ) -> Manifold:
        """Manifold of the generated images in `rows` and the real ones in `real_rows`, more than 3 of each.

        None: all images. The balls depend on these images only.
        """
        to_real = self._to_real
        own_radii = self._own_radii
        real_radii = self._real_radii
        if rows is not None:
            to_real = to_real[rows]
            own_radii = _radii(self._own[np.ix_(rows, rows)], self.K)
        if real_rows is not None:
            to_real = to_real[:, real_rows]
            real_radii = _radii(self._of_real[np.ix_(real_rows, real_rows)], self.K)
        return Manifold(
            precision=float((to_real <= real_radii).any(1).mean()),
            recall=float((to_real <= own_radii[:, None]).any(0).mean()),
        )


def projection(size: int, target: int) -> Array:
    """[size, target]: orthonormal projection onto a random subspace, since FID of many features needs many images."""
    # RandomState, since numpy has frozen its streams. FID does not depend on the basis of the subspace.
    q, _ = np.linalg.qr(np.random.RandomState(0).standard_normal((size, target)))
    return q


def _kernel_sums(x: Array, y: Array, own: bool = False) -> Array:
    """For each x, the kernel summed over all y; `own`: y is x, and pairs of an image with itself do not count."""
    sums = np.empty(len(x))
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        sums[rows] = ((x[rows] @ y.T / x.shape[1] + 1) ** 3).sum(1)
    return sums - ((x * x).sum(1) / x.shape[1] + 1) ** 3 if own else sums


def _without_each(own: Array, other: Array, m: int) -> Array:
    """KID without each image of a set in turn, [N], except for the other set's own term, which is constant.

    Args:
        own: [N], the sum of the image's kernel with the others of its set.
        other: [N], with all M of the other set.
        m: M.
    """
    n = len(own)
    return (own.sum() - 2 * own) / ((n - 1) * (n - 2)) - 2 * (other.sum() - other) / ((n - 1) * m)


def _distances(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float32]:
    from sklearn.metrics.pairwise import euclidean_distances  # takes seconds to import

    # Computed in float64, stored in float32, since there are N^2 distances.
    return euclidean_distances(np.asarray(x, np.float64), np.asarray(y, np.float64)).astype(np.float32)


def _radii(own: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """[N]: the distance of each image to its k-th nearest other image.

    Args:
        own: [N, N], with 0 from itself to itself.
    """
    if len(own) <= k:
        raise ValueError(f"there are {len(own)} images; a {k}-th neighbour needs at least {k + 1}")
    return np.partition(own, k, axis=1)[:, k]
