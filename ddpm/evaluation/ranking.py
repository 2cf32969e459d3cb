"""Ranks, with ties, of numbers with errors.

A rank is a range, from 1 + the number of significantly better competitors to N - the number of significantly worse
ones. Two competitors without a significant difference are a tie. All pairs are tested; of N equal competitors a pair
differs significantly in at most LEVEL of all cases: Holm 1979, "A simple sequentially rejective multiple test
procedure".

Competitors are nets, or configurations, of each of which several nets were trained.

Axes: N competitors, P = N (N - 1) / 2 pairs, M images on which all were evaluated, K trainings of a configuration.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Z = 1.96
"""Standard errors to each side of an interval: 95 % of a normal distribution."""
LEVEL = 0.05
"""Largest probability of claiming a difference where there is none."""


class Rank(NamedTuple):
    """The range of places of a competitor, from 1 on."""

    best: int
    worst: int

    def __str__(self) -> str:
        return str(self.best) if self.best == self.worst else f"{self.best}-{self.worst}"


def ranks(values: ArrayLike, errors: ArrayLike) -> list[Rank]:
    """Ranks of independent numbers [N] with standard errors [N], lower is better, by the normal distribution.

    For numbers that vary together, such as KIDs from the same real images, the test is conservative.
    """
    v = np.asarray(values, float)
    e = np.asarray(errors, float)
    row, column = np.triu_indices(len(v), 1)
    return _ranks(len(v), v[row] - v[column], np.hypot(e[row], e[column]), stats.norm)


def paired_ranks(values: ArrayLike) -> list[Rank]:
    """Ranks of nets evaluated on the same images; differences are tested with Student's paired t-test.

    What nets share on an image cancels in the difference, so much smaller differences are significant.

    Args:
        values: [N, M], lower is better; M at least 2.
    """
    v = np.asarray(values, float)
    n, m = v.shape
    row, column = np.triu_indices(n, 1)
    difference = v[row] - v[column]
    return _ranks(n, difference.mean(1), difference.std(1, ddof=1) / m**0.5, stats.t(m - 1))


def configuration_ranks(values: Sequence[NDArray[np.float64]]) -> list[Rank]:
    """Ranks of configurations, from several trainings of each; see `configuration_difference`.

    Args:
        values: of each configuration [K, M], lower is better; K may differ between them.
    """
    pairs = [configuration_difference(a, b) for a, b in combinations(values, 2)]
    difference, error, dof = np.reshape(pairs, (-1, 3)).T
    return _ranks(len(values), difference, error, stats.t(dof))


def configuration_difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float, float]:
    """The mean of a - b, its standard error, and the degrees of freedom of that error.

    The error has the spread of the trainings of either configuration, and that of the images, paired, if there are
    several.

    Args:
        a, b: [K, M], K trainings of a configuration, at least 2; the same M images for both. M = 1: one number of each
            training, such as KID.

    Source: Welch 1947, "The generalization of Student's problem when several different population variances are
    involved". With three trainings of each, Welch's test claims a difference between equals in 3 % of all cases, and
    in 6 % if one of them spreads four times as much; Student's test with a pooled spread in 5 % and 8 %, and in 20 %
    if the one that spreads more was trained three times, and the other one six times (simulated).
    """
    of_image = a.mean(0) - b.mean(0)
    samples = [a.mean(1), b.mean(1)]
    if len(of_image) > 1:
        samples.append(of_image)
    parts = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    dof = np.array([len(sample) - 1 for sample in samples])
    with np.errstate(invalid="ignore"):  # identical trainings
        return of_image.mean(), parts.sum() ** 0.5, parts.sum() ** 2 / (parts**2 / dof).sum()


def _ranks(
    n: int, difference: NDArray[np.float64], error: NDArray[np.float64], distribution: Any
) -> list[Rank]:
    """Ranks of N from all pairs: differences [P] in the order of np.triu_indices, and their standard errors [P].

    Args:
        distribution: of difference / error between equals.
    """
    first, second = np.triu_indices(n, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = difference / error
    t[np.isnan(t)] = 0  # equal for every image, or unknown
    is_significant = _rejected(2 * distribution.sf(abs(t)))
    better = np.where(t < 0, first, second)[is_significant]
    worse = np.where(t < 0, second, first)[is_significant]
    num_better = np.bincount(worse, minlength=n)  # of each competitor: how many are significantly better
    num_worse = np.bincount(better, minlength=n)
    return [Rank(1 + int(b), n - int(w)) for b, w in zip(num_better, num_worse, strict=True)]


def _rejected(p: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[P]: the hypotheses that Holm's procedure rejects at LEVEL, given their p-values."""
    order = np.argsort(p)
    bounds = LEVEL / np.arange(len(p), 0, -1)  # LEVEL / P for the smallest p-value, LEVEL for the largest
    is_above = p[order] > bounds
    num_rejected = int(is_above.argmax()) if is_above.any() else len(p)
    rejected = np.zeros(len(p), bool)
    rejected[order[:num_rejected]] = True
    return rejected
