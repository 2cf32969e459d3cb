"""Whether errors and ranks are right: intervals cover, and searches of equal trials claim no difference.

    python benchmarks/honesty_statistics.py

Simulated, with features and bits/dim of known true values; three to twenty minutes of one core. The old formulas are
kept here for comparison. The tables go to benchmarks/honesty-statistics.md.

Axes: N generated images, M real images, F features; in searches of configurations, M held-out images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import tables
from harness.arguments import read
from numpy.typing import NDArray

from ddpm.evaluation.feature_scores import score_features
from ddpm.evaluation.features import Features
from ddpm.evaluation.jackknife import GROUPS, jackknife_error
from ddpm.evaluation.metrics import Distances, Moments, fid, kid
from ddpm.evaluation.ranking import Rank, Z, configuration_ranks, paired_ranks, ranks

Array = NDArray[np.float64]

NUM_GENERATED = 300
SIZE = 16
MANY_GENERATED = 2000
"""Generated images for KID alone: the default of `jobs/evaluate.py`."""
TRIALS = 16
TRIAL_NOISE = 0.3
KID_GENERATED = 200
CONFIGURATIONS = 8
FINALISTS = 3
HELD_OUT = 256
NET_NOISE = 0.15
"""Spread of bits/dim over images: with it, the difference of two nets over 297 images has the error 0.0121, that of
two digits nets in a search."""


@dataclass(frozen=True)
class Arguments:
    """How often to simulate."""

    repetitions: int = 200
    searches: int = 400


def normal(n: int, seed: int, shift: float = 0.0) -> Features:
    """Features from N(shift, I)."""
    values = shift + np.random.RandomState(seed).standard_normal((n, SIZE))
    return values.astype(np.float32)


def kernel(a: Array, b: Array) -> Array:
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid_of_shift(shift: float) -> float:
    """KID of N(shift, I) and N(0, I), from the moments of x y."""
    square = shift**2
    return (1 + square) ** 3 - 1 + (6 * square**2 + 3 * square) / SIZE + 6 * square / SIZE**2


def old_kid_error(x: Array, y: Array) -> float:
    """The jackknife over the generated images, with fixed real ones."""
    n = len(x)
    m = len(y)
    own = kernel(x, x)
    to_real = kernel(x, y).sum(1)
    np.fill_diagonal(own, 0)
    to_own = own.sum(1)
    without = (to_own.sum() - 2 * to_own) / ((n - 1) * (n - 2))
    return jackknife_error(without - 2 * (to_real.sum() - to_real) / ((n - 1) * m))


def old_errors(generated: Features, real: Features) -> list[float]:
    """[4], in the order of `score`: groups i mod 10 of the generated images, with fixed real ones."""
    rows = np.arange(len(generated))
    of_real = Moments.of(real)
    distances = Distances(generated, real)
    kept = [rows[rows % GROUPS != k] for k in range(GROUPS)]
    of_fid = np.array([fid(of_real, Moments.of(generated[left])) for left in kept])
    of_manifold = np.array([distances.manifold(left) for left in kept])
    x = generated.astype(float)
    y = real.astype(float)
    return [jackknife_error(of_fid), old_kid_error(x, y), *(jackknife_error(w) for w in of_manifold.T)]


def intervals(repetitions: int) -> Iterator[list[object]]:
    for shift in (0.0, 0.3):
        for n_real in (90, 1000):
            found = []
            old = []
            for i in range(repetitions):
                sides = normal(NUM_GENERATED, 2 * i, shift), normal(n_real, 2 * i + 1)
                found.append(score_features("pixels", *sides))
                old.append(old_errors(*sides))
            for j, first in enumerate(found[0]):
                name = first.name.removesuffix("-pixels")
                values, errors = np.array([(f[j].value, f[j].error) for f in found]).T
                right = kid_of_shift(shift) if name == "KID" else values.mean()
                numbers = NUM_GENERATED, n_real
                yield covered(shift, numbers, name, values, right, np.array(old)[:, j], errors)
        for n_real in (90, 1000):
            of_kid = []
            for i in range(repetitions):
                x = normal(MANY_GENERATED, 2 * i, shift).astype(float)
                y = normal(n_real, 2 * i + 1).astype(float)
                of_kid.append((*kid(x, y), old_kid_error(x, y)))
            values, errors, before = np.array(of_kid).T
            numbers = MANY_GENERATED, n_real
            yield covered(shift, numbers, "KID", values, kid_of_shift(shift), before, errors)


def covered(
    shift: float, numbers: tuple[int, int], name: str, values: Array, right: float, *errors: Array
) -> list[object]:
    """A row: how often `right` lies within Z errors, for the old and the new errors."""
    cells: list[object] = [
        f"{shift:g}",
        *map(str, numbers),
        name,
        f"{values.mean():.4f}",
        f"{values.std(ddof=1):.4f}",
    ]
    for error in errors:
        cells += [f"{error.mean():.4f}", f"{(abs(values - right) <= Z * error).mean():.1%}"]
    return cells


def any_pair(values: Array) -> bool:
    """Whether some mean difference of [TRIALS, M] is below 0 by Z errors, as before."""
    difference = values[:, None] - values[None]
    error = difference.std(2, ddof=1) / values.shape[1] ** 0.5
    return bool((difference.mean(2) + Z * error < 0).any())


def searches(repetitions: int) -> Iterator[list[object]]:
    tie = [Rank(1, TRIALS)] * TRIALS
    for num_images in (90, 512):
        rng = np.random.default_rng(0)
        old = 0
        new = 0
        for _ in range(repetitions):
            image = rng.gamma(9, 1 / 3, num_images)
            bits = image + rng.normal(0, TRIAL_NOISE, (TRIALS, num_images))
            old += any_pair(bits)
            new += paired_ranks(bits) != tie
        yield row("bits/dim, image by image", num_images, repetitions, old, new)
    for num_images in (90, 512):
        old = new = 0
        for i in range(repetitions):
            real = normal(num_images, (TRIALS + 1) * i).astype(float)
            drawn = [normal(KID_GENERATED, (TRIALS + 1) * i + 1 + k).astype(float) for k in range(TRIALS)]
            values, errors = np.array([kid(x, real) for x in drawn]).T
            fixed = np.array([old_kid_error(x, real) for x in drawn])
            old += bool((values + Z * fixed).min() < (values - Z * fixed).max())
            new += ranks(values, errors) != tie
        yield row("KID by its errors", num_images, repetitions, old, new)


def configurations(repetitions: int) -> Iterator[list[object]]:
    """Searches whose trials differ by their training's luck; the best of them are trained again, and compared."""
    for spread, of_first, better in (
        (0.01, 1.0, 0.0),
        (0.03, 1.0, 0.0),
        (0.065, 1.0, 0.0),  # as measured on Fashion-MNIST (spread.md)
        (0.01, 4.0, 0.0),
        (0.01, 1.0, 0.05),
        (0.01, 1.0, 0.1),
    ):
        for seeds in (2, 3, 5):
            rng = np.random.default_rng(0)
            of_nets = 0
            claims = 0
            for _ in range(repetitions):
                image = rng.gamma(9, 1 / 3, HELD_OUT)
                spreads = np.full(CONFIGURATIONS, spread)
                means = np.zeros(CONFIGURATIONS)
                spreads[0] *= of_first
                means[0] -= better
                luck = means + spreads * rng.standard_normal((seeds, CONFIGURATIONS))
                bits = luck[..., None] + image + rng.normal(0, NET_NOISE, (*luck.shape, HELD_OUT))
                of_nets += paired_ranks(bits[0]) != [Rank(1, CONFIGURATIONS)] * CONFIGURATIONS
                chosen = bits[0].mean(1).argsort()[:FINALISTS]
                claims += (
                    configuration_ranks(list(bits[:, chosen].swapaxes(0, 1)))
                    != [Rank(1, FINALISTS)] * FINALISTS
                )
            share = [f"{count / repetitions:.1%}" for count in (of_nets, claims)]
            yield [spread, f"{of_first:g} times that", better, seeds, repetitions, *share]


def row(what: str, num_images: int, repetitions: int, old: int, new: int) -> list[object]:
    return [what, num_images, repetitions, f"{old / repetitions:.1%}", f"{new / repetitions:.1%}"]


def main() -> None:
    arguments = read(Arguments, __doc__, repetitions=2, searches=2)
    spread = "shift generated real metric mean spread".split()
    spread += ["error, old", "covers, old", "error", "covers"]
    claims = ["what is compared", "images", "searches", "claim a difference, uncorrected", "Holm"]
    trained = ["spread of trainings", "of the first", "the first is better by", "trainings of each finalist"]
    trained += ["searches", "claim that nets differ", "claim that configurations differ"]
    tables.write(
        str(Path(__file__).with_stem("honesty-statistics")),
        "Errors and ranks, simulated",
        f"{tables.machine('numpy')}; `python benchmarks/honesty_statistics.py`.",
        "",
        f"Intervals: the value ± {Z} errors, over {arguments.repetitions} pairs of sets: generated images have "
        f"{SIZE} features from N(shift, I), real ones from N(0, I). Covered is KID's true value; the others are "
        "biased by the number of images, and covered is their mean over the pairs. Old: groups i mod 10 of the "
        "generated images, the real ones held fixed.",
        "",
        *tables.table(spread, intervals(arguments.repetitions)),
        "",
        f"Searches of {TRIALS} equal trials, judged by the same images. bits/dim: an image's difficulty is shared, a "
        f"trial's own noise is {TRIAL_NOISE}. KID: {KID_GENERATED} images of each trial, from the distribution of the "
        "real ones. Uncorrected: any pair apart by 1.96 errors image by image, or with intervals that do not overlap.",
        "",
        *tables.table(claims, searches(arguments.searches)),
        "",
        f"Searches of {CONFIGURATIONS} configurations, of which the {FINALISTS} whose nets are best are trained again "
        "with other seeds, as by `--finalist-seeds`. A training adds its luck, of this standard deviation in bits/dim, "
        f"to all of {HELD_OUT} held-out images, and noise of {NET_NOISE} to each. Where no configuration is better, a "
        "claim about configurations is wrong, one about nets is right.",
        "",
        *tables.table(trained, configurations(arguments.searches)),
    )


if __name__ == "__main__":
    main()
