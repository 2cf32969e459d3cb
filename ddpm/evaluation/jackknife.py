"""Standard errors by leaving images out: the two-sample jackknife, this package's only resampling.

Generated and real images are two independent samples. A group of images is left out in turn, and the spread of the
results is the standard error of redrawing both samples. It is not too small on average. A group is one image for KID,
which has a formula for that, and a tenth of the images for FID, precision and recall, which are computed again. A
bootstrap does not suit them: it repeats images, and a repeated image has a neighbour at distance 0. Two other numbers
need no resampling: a mean over images has the error std / sqrt(N), and the share of memorised images has an exact
interval (memorisation.py).

A conditional net generates a fixed number of images of each class, so its images are left out class by class. Real
images have a random number of each class, which is part of the error: they are left out regardless of class.

Source: Efron & Stein 1981; Arvesen 1969 for several samples.

Axes: N images of a sample, G groups.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

GROUPS = 10
"""Groups of a sample, where each is left out by computing the metric again."""

Rows = NDArray[np.int64]


def jackknife_error(*without: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard error of an estimate from independent samples.

    Args:
        without: for each sample the estimates without each of its G groups in turn, [G, ...]; a constant may be
            missing in all of them.
    """
    variance = sum((len(values) - 1) * values.var(axis=0) for values in without)
    return np.sqrt(variance)


def error_of_groups(
    estimate: Callable[[Rows | None, Rows | None], ArrayLike],
    n: int,
    m: int,
    label: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """The standard error of `estimate`, which is computed without each group of the generated and the real images.

    Args:
        estimate: takes the rows of generated and of real images that are left; None: all of them.
        n: generated images.
        m: real images.
        label: [N], the requested classes; None: no classes.
    """
    without_generated = [estimate(_others(rows, n), None) for rows in _groups(n, label)]
    without_real = [estimate(None, _others(rows, m)) for rows in _groups(m)]
    return jackknife_error(np.array(without_generated), np.array(without_real))


def strata(n: int, label: NDArray[np.int64] | None) -> list[NDArray[np.bool_]]:
    """The images of each class, [N] each; classes with one image, which show no spread, are merged."""
    if label is None:
        return [np.ones(n, bool)]
    _, stratum, counts = np.unique(label, return_inverse=True, return_counts=True)
    stratum[counts[stratum] == 1] = -1
    return [stratum == k for k in np.unique(stratum)]


def _groups(n: int, label: NDArray[np.int64] | None = None) -> list[Rows]:
    """The rows of each group, from one fixed permutation, with equally many images of each class."""
    order = np.random.RandomState(0).permutation(n)  # RandomState, since numpy has frozen its streams
    if label is not None:
        order = order[np.argsort(label[order], kind="stable")]
    return [np.sort(order[k::GROUPS]) for k in range(GROUPS)]


def _others(rows: Rows, n: int) -> Rows:
    return np.delete(np.arange(n), rows)
