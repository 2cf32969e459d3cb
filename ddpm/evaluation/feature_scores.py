"""Scores from features: each named by its feature net, with n, uncertainty, and floor.

The floor is the same metric of equally many other real images against the same real images: a perfect model's score.
"FID" alone means Inception's; with other nets it carries their name, "FID-lite0".

Axes: N generated images, M real images, F features; for the bound, N real images.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import WrapValidator

from ddpm.evaluation.features import Features
from ddpm.evaluation.metrics import Distances, Estimate, Moments, fid, jackknife_error, kid, projection
from ddpm.utils.errors import UserError

GROUPS = 10
"""Groups of the generated and of the real images, left out in turn for the errors of FID and the manifold's metrics."""
MAX_PAIRWISE = 10_000
"""KID and the manifold's metrics compare pairs of images, of this many images at most."""
MAX_FID_FEATURES = 128
"""More features than this are projected (except Inception's), since FID would depend on n more than on the images."""
LEAST_IMAGES = 2 * GROUPS
BOUND_TERMS = ("bits/dim-prior", "bits/dim-kl", "bits/dim-decoder")


Number = Annotated[float, WrapValidator(lambda value, parse: math.nan if value is None else parse(value))]
"""A number that is null in JSON if it is not finite."""


@dataclass(frozen=True)
class Score:
    """One metric with its uncertainty."""

    name: str
    """Name with the feature net: "KID-lite0"."""
    value: Number
    error: Number
    """Standard error of redrawing generated and real images (two-sample jackknife); for bits/dim, over images."""
    n: int
    """Generated images; for bits/dim, real ones."""
    n_real: int | None = None
    """Real images in the comparison."""
    floor: float | None = None
    """Value of real images against real images."""
    floor_error: float | None = None
    floor_n: int | None = None
    """Images of the floor: n, unless there are fewer."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.error)


def score(
    net_name: str,
    generated: Features,
    real: Features,
    other_real: Features | None = None,
    label: NDArray[np.int64] | None = None,
) -> list[Score]:
    """FID, KID, precision, recall, density and coverage, with one feature net.

    Args:
        real: of held-out images.
        other_real: of other real images, for the floor; the first N of them are used.
        label: [N], the requested classes; None: no classes.
    """
    scores = list(_without_floor(net_name, generated, real, label))
    if other_real is None:
        return scores
    floors = _without_floor(net_name, other_real[: len(generated)], real)
    return [
        replace(s, floor=floor.value, floor_error=floor.error, floor_n=floor.n)
        for s, floor in zip(scores, floors, strict=True)
    ]


def bound_scores(terms: NDArray[np.float64]) -> list[Score]:
    """The bound and its three terms, in bits/dim; the errors are over images, noise and t.

    Args:
        terms: [N, 3], from `measure.bits_per_dim`.
    """
    n = len(terms)
    columns = {"bits/dim": terms.sum(1)} | dict(zip(BOUND_TERMS, terms.T, strict=True))
    return [
        Score(name, float(v.mean()), float(v.std(ddof=1) / n**0.5) if n > 1 else float("nan"), n)
        for name, v in columns.items()
    ]


def _without_floor(
    net_name: str, generated: Features, real: Features, label: NDArray[np.int64] | None = None
) -> Iterator[Score]:
    for side in (generated, real):
        if len(side) < LEAST_IMAGES:
            raise UserError(
                f"there are {len(generated)} generated and {len(real)} real images; "
                f"a comparison needs at least {LEAST_IMAGES} of each"
            )
    n, m = len(generated), len(real)
    name, estimate = _fid(net_name, generated, real, label)
    yield Score(name, *estimate, n, m)
    generated, real = generated[:MAX_PAIRWISE], real[:MAX_PAIRWISE]
    n, m = len(generated), len(real)
    label = None if label is None else label[:n]
    yield Score(f"KID-{net_name}", *kid(generated, real, label), n, m)
    for metric, estimate in _manifold(generated, real, label).items():
        yield Score(f"{metric}-{net_name}", *estimate, n, m)


def _fid(
    net_name: str, generated: Features, real: Features, label: NDArray[np.int64] | None
) -> tuple[str, Estimate]:
    name = "FID" if net_name == "inception" else f"FID-{net_name}"
    size = generated.shape[1]
    if net_name != "inception" and size > MAX_FID_FEATURES:
        name, basis = f"{name}-{MAX_FID_FEATURES}d", projection(size, MAX_FID_FEATURES)
        generated, real = ((side @ basis).astype(np.float32) for side in (generated, real))
    n, m, ours, theirs = len(generated), len(real), Moments.of(generated), Moments.of(real)
    without_ours = [fid(theirs, Moments.of(generated[_others(rows, n)])) for rows in _groups(n, label)]
    without_theirs = [fid(ours, Moments.of(real[_others(rows, m)])) for rows in _groups(m)]
    error = jackknife_error(np.array(without_ours), np.array(without_theirs))
    return name, Estimate(fid(theirs, ours), error)


def _manifold(generated: Features, real: Features, label: NDArray[np.int64] | None) -> dict[str, Estimate]:
    n, m = len(generated), len(real)
    distances = Distances(generated, real)
    without_ours = np.array([distances.manifold(rows=_others(rows, n)) for rows in _groups(n, label)])
    without_theirs = np.array([distances.manifold(real_rows=_others(rows, m)) for rows in _groups(m)])
    estimates = {}
    for i, (metric, value) in enumerate(distances.manifold()._asdict().items()):
        error = jackknife_error(without_ours[:, i], without_theirs[:, i])
        if metric != "density":
            error = max(error, _share_error(value, n if metric == "precision" else m))
        estimates[metric] = Estimate(value, error)
    return estimates


def _share_error(share: float, n: int) -> float:
    """The smallest standard error of a share of n images.

    For a share of 0 or 1 the jackknife gives no error. Two images are added to either side (Agresti & Coull 1998).
    """
    p = (share * n + 2) / (n + 4)
    return float((p * (1 - p) / (n + 4)) ** 0.5)


def _groups(n: int, label: NDArray[np.int64] | None = None) -> list[NDArray[np.int64]]:
    """The rows of each group, from one fixed permutation, stratified by class.

    Real images have no `label` here: their number per class is random, as in redrawn ones, and part of the error. A
    conditional net makes a fixed number per class.
    """
    order = np.random.RandomState(0).permutation(n)  # RandomState, since numpy has frozen its streams
    if label is not None:
        order = order[np.argsort(label[order], kind="stable")]
    return [np.sort(order[k::GROUPS]) for k in range(GROUPS)]


def _others(rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    return np.delete(np.arange(n), rows)
