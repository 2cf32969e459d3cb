"""Who is better than whom, when every number has an error: ranks with ties, and how far two rankings agree.

A rank is a range, from 1 + how many are surely better to N - how many are surely worse. Two of which neither is surely
better are a tie.

Axes: N competitors, M images they all were judged by.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Z = 1.96
"""Standard errors to each side of an interval: 95 % of a normal distribution."""


class Rank(NamedTuple):
    """The places that a competitor may have, from 1 on."""

    best: int
    worst: int

    def __str__(self) -> str:
        return str(self.best) if self.best == self.worst else f"{self.best}-{self.worst}"


class Agreement(NamedTuple):
    """Rank correlations, from -1 to 1; nan where one side does not vary."""

    spearman: float
    kendall: float
    """tau-b, which reckons with equal values."""


def ranks(values: ArrayLike, errors: ArrayLike) -> list[Rank]:
    """Of independent numbers, the less the better: one is surely better where its interval lies below the other's.

    Args:
        values: [N].
        errors: [N], standard errors.
    """
    v, e = np.asarray(values, float), np.asarray(errors, float)
    return _ranks((v + Z * e)[:, None] < (v - Z * e)[None, :])


def paired_ranks(values: ArrayLike) -> list[Rank]:
    """Of competitors judged by the same images: surely better is whose mean difference is below 0 by Z errors.

    What an image costs everybody drops out of the difference, so that much smaller ones are told apart.

    Args:
        values: [N, M], the less the better.
    """
    v = np.asarray(values, float)
    difference = v[:, None] - v[None, :]
    error = difference.std(2, ddof=1) / v.shape[1] ** 0.5
    return _ranks(difference.mean(2) + Z * error < 0)


def agreement(a: ArrayLike, b: ArrayLike) -> Agreement:
    """How far two numbers of the same competitors, [N] each, rank them alike."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Agreement(float("nan"), float("nan"))
    return Agreement(float(stats.spearmanr(a, b).statistic), float(stats.kendalltau(a, b).statistic))


def _ranks(surely_better: NDArray[np.bool_]) -> list[Rank]:
    """Of [N, N]: whether the row is surely better than the column."""
    n = len(surely_better)
    worse_than, better_than = surely_better.sum(0), surely_better.sum(1)
    return [Rank(1 + int(w), n - int(b)) for w, b in zip(worse_than, better_than, strict=True)]
