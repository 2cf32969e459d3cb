"""The agreement of two rankings."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Agreement(NamedTuple):
    """Rank correlations, from -1 to 1; nan where one side does not vary."""

    spearman: float
    kendall: float
    """tau-b, which allows for equal values."""


def agreement(a: ArrayLike, b: ArrayLike) -> Agreement:
    """Rank correlations of two numbers of the same competitors, [N] each."""
    a = np.asarray(a, float)
    b = np.asarray(b, float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Agreement(float("nan"), float("nan"))
    return Agreement(float(stats.spearmanr(a, b).statistic), float(stats.kendalltau(a, b).statistic))
