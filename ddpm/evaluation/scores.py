"""From features to a table: each number named by its feature net, with n, its uncertainty, and its floor.

The floor is the same metric of other real images, as many, against the same real images: what a perfect model would
get. "FID" alone means Inception's; of the other nets it is called by theirs, "FID-lite0".

Axes: N generated images, M real images, F features.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ddpm.config import UserError
from ddpm.evaluation.features import Features
from ddpm.evaluation.metrics import (
    Distances,
    Estimate,
    Manifold,
    Moments,
    fid,
    jackknife_error,
    kid,
    projection,
)

GROUPS = 10
"""Of the generated images, left out in turn for the uncertainty of FID and of the manifold's four."""
MAX_PAIRWISE = 10_000
"""KID and the manifold's four compare pairs of images; of more, the first so many are taken."""
MAX_FID_FEATURES = 128
"""FID of more features than that is a matter of n rather than of images; they are projected (but not Inception's)."""
LEAST_IMAGES = 2 * GROUPS


@dataclass(frozen=True)
class Score:
    """One number."""

    name: str
    """With its feature net: "KID-lite0"."""
    value: float
    error: float
    """Standard error over the generated images, the real ones held fixed (jackknife); of bits/dim over images."""
    n: int
    """Generated images; of bits/dim, real ones."""
    n_real: int | None = None
    """Real images they are compared with."""
    floor: float | None = None
    """Real against real."""
    floor_error: float | None = None
    floor_n: int | None = None
    """Images of the floor: n, unless there are fewer."""


def score(
    net_name: str, generated: Features, real: Features, other_real: Features | None = None
) -> list[Score]:
    """FID, KID, precision, recall, density and coverage, of one feature net.

    Args:
        net_name: FeatureNet.name.
        generated: of the model.
        real: of images it was not trained on.
        other_real: of other real images, for the floor; the first N of them are used.

    Raises:
        UserError: too few images on one side.
    """
    scores = list(_without_floor(net_name, generated, real))
    if other_real is None:
        return scores
    floor_features = _first(other_real, len(generated))
    floors = _without_floor(net_name, floor_features, real)
    return [
        replace(s, floor=floor.value, floor_error=floor.error, floor_n=floor.n)
        for s, floor in zip(scores, floors, strict=True)
    ]


def _without_floor(net_name: str, generated: Features, real: Features) -> Iterator[Score]:
    for side in (generated, real):
        if len(side) < LEAST_IMAGES:
            raise UserError(
                f"there are {len(generated)} generated and {len(real)} real images; "
                f"it takes at least {LEAST_IMAGES} of each to compare them"
            )
    n, m = len(generated), len(real)
    name, estimate = _fid(net_name, generated, real)
    yield Score(name, *estimate, n, m)
    generated, real = _first(generated, MAX_PAIRWISE), _first(real, MAX_PAIRWISE)
    n, m = len(generated), len(real)
    yield Score(f"KID-{net_name}", *kid(generated.values, real.values), n, m)
    distances = Distances(generated.values, real.values)
    whole = distances.manifold()
    without = np.array([distances.manifold(rows) for rows in _leaving_one_group_out(n)])
    for i, metric in enumerate(Manifold._fields):
        yield Score(f"{metric}-{net_name}", whole[i], jackknife_error(without[:, i]), n, m)


def _fid(net_name: str, generated: Features, real: Features) -> tuple[str, Estimate]:
    name = "FID" if net_name == "inception" else f"FID-{net_name}"
    size = generated.values.shape[1]
    if net_name != "inception" and size > MAX_FID_FEATURES:
        name, basis = f"{name}-{MAX_FID_FEATURES}d", projection(size, MAX_FID_FEATURES)
        generated, real = (
            replace(side, values=(side.values @ basis).astype(np.float32)) for side in (generated, real)
        )
    groups = [Moments.of(generated.values[k::GROUPS]) for k in range(GROUPS)]
    of_real = Moments.of(real.values)
    without = [fid(of_real, Moments.merge(*groups[:k], *groups[k + 1 :])) for k in range(GROUPS)]
    return name, Estimate(fid(of_real, Moments.merge(*groups)), jackknife_error(np.array(without)))


def _leaving_one_group_out(n: int) -> Iterator[NDArray[np.int64]]:
    rows = np.arange(n)
    for k in range(GROUPS):
        yield rows[rows % GROUPS != k]


def _first(features: Features, n: int) -> Features:
    return Features(features.index[:n], features.values[:n])
