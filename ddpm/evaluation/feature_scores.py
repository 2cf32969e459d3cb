"""Scores of generated images by one feature net: FID, KID, precision, recall.

Each is named by its feature net, and has its n, its standard error (jackknife.py), and its floor: the same metric of
equally many other real images against the same real images, which is a perfect model's score. "FID" alone means
Inception's; with other nets it carries their name, "FID-lite0".

Axes: N generated images, M real images, F features.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ddpm.evaluation.features import Features
from ddpm.evaluation.jackknife import GROUPS, Rows, error_of_groups
from ddpm.evaluation.metrics import Distances, Estimate, Manifold, Moments, fid, kid, projection
from ddpm.runs.evaluations import Score
from ddpm.utils.errors import UserError

MAX_PAIRWISE = 10_000
"""KID and the manifold's metrics compare pairs of images, of this many images at most."""
MAX_FID_FEATURES = 128
"""More features than this are projected (except Inception's), since FID would depend on n more than on the images."""
LEAST_IMAGES = 2 * GROUPS


def score_features(
    net_name: str,
    generated: Features,
    real: Features,
    other_real: Features | None = None,
    label: NDArray[np.int64] | None = None,
) -> list[Score]:
    """All scores with one feature net.

    Args:
        real: of held-out images.
        other_real: of other real images, for the floor; the first N of them are used.
        label: [N], the requested classes; None: no classes.
    """
    scores = _without_floor(net_name, generated, real, label)
    if other_real is None:
        return scores
    floors = _without_floor(net_name, other_real[: len(generated)], real)
    return [
        replace(score, floor=floor.value, floor_error=floor.error)
        for score, floor in zip(scores, floors, strict=True)
    ]


def _without_floor(
    net_name: str, generated: Features, real: Features, label: NDArray[np.int64] | None = None
) -> list[Score]:
    n = len(generated)
    m = len(real)
    if min(n, m) < LEAST_IMAGES:
        raise UserError(
            f"there are {n} generated and {m} real images; a comparison needs at least {LEAST_IMAGES} of each"
        )
    name, of_fid = _fid(net_name, generated, real, label)
    scores = [Score(name, of_fid.value, of_fid.error, n, m)]
    generated = generated[:MAX_PAIRWISE]
    real = real[:MAX_PAIRWISE]
    label = None if label is None else label[:MAX_PAIRWISE]
    pairwise = {"KID": kid(generated, real, label), **_manifold(generated, real, label)}
    for metric, (value, error) in pairwise.items():
        scores.append(Score(f"{metric}-{net_name}", value, error, len(generated), len(real)))
    return scores


def _fid(
    net_name: str, generated: Features, real: Features, label: NDArray[np.int64] | None
) -> tuple[str, Estimate]:
    """The name of the metric, which says how the features were projected, and its estimate."""
    name = "FID" if net_name == "inception" else f"FID-{net_name}"
    num_features = generated.shape[1]
    if net_name != "inception" and num_features > MAX_FID_FEATURES:
        name = f"{name}-{MAX_FID_FEATURES}d"
        basis = projection(num_features, MAX_FID_FEATURES)
        generated = (generated @ basis).astype(np.float32)
        real = (real @ basis).astype(np.float32)
    of_generated = Moments.of(generated)
    of_real = Moments.of(real)

    def without(rows: Rows | None, real_rows: Rows | None) -> float:
        if rows is not None:
            return fid(of_real, Moments.of(generated[rows]))
        return fid(of_generated, Moments.of(real[real_rows]))

    error = error_of_groups(without, len(generated), len(real), label)
    return name, Estimate(fid(of_real, of_generated), float(error))


def _manifold(generated: Features, real: Features, label: NDArray[np.int64] | None) -> dict[str, Estimate]:
    n = len(generated)
    m = len(real)
    distances = Distances(generated, real)
    errors = Manifold(*error_of_groups(distances.manifold, n, m, label).tolist())
    values = distances.manifold()
    return {
        "precision": Estimate(values.precision, max(errors.precision, _share_error(values.precision, n))),
        "recall": Estimate(values.recall, max(errors.recall, _share_error(values.recall, m))),
    }


def _share_error(share: float, n: int) -> float:
    """The smallest standard error of a share of n images.

    For a share of 0 or 1 the jackknife gives no error. Two images are added to either side (Agresti & Coull 1998).
    """
    p = (share * n + 2) / (n + 4)
    return float((p * (1 - p) / (n + 4)) ** 0.5)
