"""Memorisation: the share of generated images that lie nearer to a training image than held-out images do.

The threshold is the 1st percentile of the held-out images' distances to their nearest training image. A net that has
learned the distribution falls below it as often as held-out images do; a net that repeats its training images does so
far more often. A net that makes only typical images is also near to training images, without copying; so the nearest
pairs are kept for inspection.

Axes: N generated images, M held-out images, K training images, D numbers per image (pixels or features).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from ddpm.evaluation.feature_scores import MAX_PAIRWISE
from ddpm.evaluation.features import Features, images_of
from ddpm.evaluation.inputs import Reference
from ddpm.evaluation.ranking import Z
from ddpm.runs.evaluations import NearerShare
from ddpm.utils import images
from ddpm.utils.images import Pixels
from ddpm.utils.progress import track

METRIC = "nearer_than_held_out"
PERCENTILE = 0.01
ALPHA = 0.05
BLOCK_BYTES = 128 << 20
"""Bytes of the images, as float32, that are compared at a time: 682 colour images of 128x128."""
NODES = 200
"""Quantiles of the threshold's rank over which the interval is integrated."""
NUM_PAIRS = 16
"""Pairs in a picture."""
CAPTIONS = ("sample", "nearest") * 4
"""Four pairs in a row."""


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each image."""

    distance: NDArray[np.float64]
    """[N]: the root mean square of the differences of the D numbers; of pixels, in grey levels."""
    index: NDArray[np.int64]
    """[N]: its position among the training images."""


class Memorised(NamedTuple):
    """The search for the training images nearest to a set of generated images."""

    shares: tuple[NearerShare, ...] = ()
    """One for each space: the feature net's, unless it is pixels, and pixels; none: there was no search."""
    picture: bytes = b""
    """A PNG of the nearest pairs."""


def search(
    reference: Reference, generated: Sequence[Pixels], features: Sequence[Features]
) -> list[Memorised]:
    """Search the training images for those nearest to each set of generated images, and to the held-out images.

    Args:
        generated: each [N, H, W, C].
        features: those of the same images, [N, F].
    """
    spaces: dict[str, list[Nearest]] = {}
    if reference.train_features is not None:
        train_features = reference.train_features
        size = block_images(train_features.shape[1:])
        blocks = (train_features[start : start + size] for start in range(0, len(train_features), size))
        queries = [values[:MAX_PAIRWISE] for values in (reference.real, *features)]
        spaces[reference.feature_net.name] = nearest(queries, blocks)
    held_out = images_of(reference.held_out_images, 0, min(len(reference.real), MAX_PAIRWISE)).image
    train = reference.train_images.fixed_order()
    parts = train.parts(0, reference.num_train, block_images(reference.train_images.shape))
    tracked = track("training images searched", reference.num_train, parts, lambda part: len(part.image))
    spaces["pixels"] = nearest([held_out, *generated], (part.image for part in tracked))
    first = next(iter(spaces))

    def train_at(position: int) -> Pixels:
        return train.read(position, position + 1).image[0]

    found = []
    for i, image in enumerate(generated, start=1):
        shares = [nearer_share(space, of[i], of[0]) for space, of in spaces.items()]
        found.append(Memorised(tuple(shares), picture(spaces[first][i], image, train_at)))
    return found


def block_images(shape: Sequence[int]) -> int:
    """How many images of that shape are compared at a time."""
    return max(1, BLOCK_BYTES // (math.prod(shape) * np.dtype(np.float32).itemsize))


def nearest(queries: Sequence[NDArray], train: Iterable[NDArray]) -> list[Nearest]:
    """The nearest training images of each set of images.

    Args:
        queries: each [N, ...], pixels or features.
        train: blocks of [K, ...] in order; one at a time is in memory.
    """
    from sklearn.metrics.pairwise import pairwise_distances_argmin  # takes seconds to import

    nearest_of = [Nearest(np.full(len(x), np.inf), np.zeros(len(x), np.int64)) for x in queries]
    start = 0
    for block in train:
        y = _flat(block)
        for query, best in zip(queries, nearest_of, strict=True):
            size = block_images(query.shape[1:])
            for i in range(0, len(query), size):
                x = _flat(query[i : i + size])
                index = pairwise_distances_argmin(x, y)
                # From the difference: |x|^2 - 2 x y + |y|^2 is imprecise at small distances, which matter most.
                distance = np.sqrt(np.mean((x - y[index]) ** 2, axis=1, dtype=np.float64))
                (closer,) = np.nonzero(distance < best.distance[i : i + len(x)])
                best.distance[i + closer] = distance[closer]
                best.index[i + closer] = start + index[closer]
        start += len(y)
    return nearest_of


def nearer_share(space: str, drawn: Nearest, held_out: Nearest) -> NearerShare:
    """The share of generated images that are nearer to a training image than 99 % of held-out images are.

    The interval is of F(q), with F the distribution of generated distances and q the quantile of held-out ones that
    the threshold estimates. The k-th smallest of M distances lies at a quantile U ~ Beta(k, M + 1 - k), whatever their
    distribution, and the count below it is Binomial(N, expit(logit U + delta)); the ends are the delta at which the
    observed count is at an end of the middle 95 %. That is exact where both kinds of images are alike (delta = 0), for
    any N and M; elsewhere the odds of lying below a distance are assumed to differ by one factor around the threshold.
    A bootstrap of both sides fails, since its smallest held-out distance is never below the observed one: without
    memorisation, N = 2,000 and M = 90, it covers 1 % in 72 % of repetitions, this interval in 98 %.

    With fewer than 99 held-out images the smallest of their distances is the threshold. Nearer is strict: where more
    than 1 % of held-out images are copies of training images, the threshold is 0, and nothing is below it.

    Args:
        space: of the distances: the feature net's name, or "pixels".
    """
    n = len(drawn.distance)
    m = len(held_out.distance)
    k = max(1, round(PERCENTILE * (m + 1)))
    threshold = float(np.sort(held_out.distance)[k - 1])
    count = int((drawn.distance < threshold).sum())
    low, high = _interval(count, n, k, m)
    return NearerShare(
        name=f"{METRIC}-{space}",
        value=count / n,
        error=(high - low) / (2 * Z),
        n=n,
        n_real=m,
        floor=k / (m + 1),
        floor_error=float(stats.betabinom.std(n, k, m + 1 - k)) / n,
        low=low,
        high=high,
    )


def picture(drawn: Nearest, image: Pixels, train_at: Callable[[int], Pixels]) -> bytes:
    """The NUM_PAIRS generated images that are nearest to a training image, beside it, the nearest first; a PNG.

    Args:
        image: [N, H, W, C], the generated images.
        train_at: from a position to the training image there, [H, W, C].
    """
    shown = []
    for i in np.argsort(drawn.distance, kind="stable")[:NUM_PAIRS]:
        shown.append(image[i])
        shown.append(train_at(int(drawn.index[i])))
    return images.png_bytes(images.grid(np.stack(shown), len(CAPTIONS), CAPTIONS))


def _interval(count: int, n: int, k: int, m: int) -> tuple[float, float]:
    """The 95 % interval of `nearer_share`."""
    u = stats.beta.ppf((np.arange(NODES) + 0.5) / NODES, k, m + 1 - k)

    def share(delta: float) -> float:
        return float(special.expit(special.logit(k / (m + 1)) + delta))

    def excess(delta: float, tail: Callable[..., Any], at: int) -> float:
        return float(tail(at, n, special.expit(special.logit(u) + delta)).mean()) - ALPHA / 2

    low = 0.0 if count == 0 else share(optimize.brentq(excess, -50, 50, (stats.binom.sf, count - 1)))
    high = 1.0 if count == n else share(optimize.brentq(excess, -50, 50, (stats.binom.cdf, count)))
    return low, high


def _flat(values: NDArray) -> NDArray[np.float32]:
    """[N, ...] to [N, D]; bytes stay exact."""
    return values.reshape(len(values), -1).astype(np.float32)
