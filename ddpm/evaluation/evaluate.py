"""Evaluation of checkpoints in pieces, on any number of workers.

A piece is a range of images, independent of the workers; the results of pieces are merged in order.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.cluster.worker_pool import WorkerPool
from ddpm.config import SampleConfig
from ddpm.data.reading import DataSet
from ddpm.evaluation import bits_per_dim, memorisation, plots
from ddpm.evaluation.bits_per_dim import PIECE_IMAGES, NetErrors
from ddpm.evaluation.feature_cache import WINDOW_ROWS, images_of
from ddpm.evaluation.feature_scores import MAX_PAIRWISE, bound_scores, score
from ddpm.evaluation.features import FeatureNet, Features, features_of
from ddpm.evaluation.inputs import (
    Candidate,
    EvalContext,
    check_effect,
    open_context,
    resolved,
    sampling_configs,
)
from ddpm.evaluation.memorisation import BLOCK_IMAGES, NearerShare, nearer_share
from ddpm.evaluation.results import CheckpointResult, Report, SampledScores
from ddpm.evaluation.settings import Settings
from ddpm.sampling import generate
from ddpm.utils.images import Pixels
from ddpm.utils.progress import track
from ddpm.utils.seeding import GENERATOR

T = TypeVar("T")
K = TypeVar("K", bound=tuple[int, SampleConfig | None])


class Piece(NamedTuple):
    """Images start..stop-1 of a candidate: sampled with a sampling configuration, or (None) held-out ones."""

    candidate: int
    sample: SampleConfig | None
    start: int
    stop: int


class Sampled(NamedTuple):
    """Images of one sampling configuration."""

    features: Features
    image: Pixels
    """uint8 [N, H, W, C]: the first MAX_PAIRWISE; none if no nearest training images are searched."""


@dataclass
class EvalWorker:
    """The state of a worker: all candidates, and the data they are compared with."""

    candidates: Sequence[Candidate]
    train: DataSet
    held_out: DataSet
    feature_net: FeatureNet
    settings: Settings
    held_out_label: NDArray[np.int64] | None
    device: torch.device

    def __post_init__(self) -> None:
        for candidate in self.candidates:
            candidate.net.to(self.device)

    def measure(self, piece: Piece) -> NetErrors:
        """Errors of the candidate of a piece, on training images that do not depend on the piece."""
        train = images_of(self.train, 0, bits_per_dim.MEASURED_IMAGES)
        return bits_per_dim.measure_errors(self.candidates[piece.candidate], train, self.settings.variance)

    def bits(self, piece: Piece, measured: Mapping[int, NetErrors]) -> NDArray[np.float64]:
        """The bound of the held-out images of a piece."""
        return bits_per_dim.bound_terms(
            self.candidates[piece.candidate],
            measured[piece.candidate],
            images_of(self.held_out, piece.start, piece.stop),
            piece.start,
            self.settings.num_draws,
            self.settings.seed,
        )

    def draw(self, piece: Piece) -> Sampled:
        """Sample the images of a piece."""
        assert piece.sample is not None
        trained = self.candidates[piece.candidate].sampled_with(piece.sample)
        label = labels_at(self.held_out_label, range(piece.start, piece.stop))
        image = generate.draw(trained, range(piece.start, piece.stop), label=label)
        kept = max(0, MAX_PAIRWISE - piece.start) if self.settings.num_train_images else 0
        return Sampled(features_of(self.feature_net, image), image[:kept].cpu().numpy())


def labels_at(held_out_label: NDArray[np.int64] | None, indices: range) -> NDArray[np.int64] | None:
    """[N]: the classes of sampled images, as often as among the held-out ones: theirs, in order, again and again."""
    return None if held_out_label is None else held_out_label[np.array(indices) % len(held_out_label)]


def evaluate(
    candidates: Sequence[Candidate], settings: Settings, num_workers: int | None = None, bounds: bool = True
) -> Report:
    """Evaluate all candidates with the same held-out images.

    Args:
        num_workers: size of the pool; results do not depend on it.
        bounds: compute bits/dim, too, of nets that have a bound.
    """
    samplings = [(i, s) for i, c in enumerate(candidates) for s in sampling_configs(c.config, settings)]
    check_effect((replace(candidates[i].config, sample=sample) for i, sample in samplings), settings)
    context = open_context(candidates, settings)
    bounded = [
        (i, None) for i, candidate in enumerate(candidates) if bounds and candidate.objective.has_bound
    ]
    num_held_out = min(settings.num_images, context.held_out.rows.num_rows)
    data = context.train, context.held_out, context.feature_net, settings, context.label
    worker = partial(EvalWorker, candidates, *data)
    with WorkerPool(worker, num_workers) as pool:
        of_nets = _all(pool, EvalWorker.measure, bounded, 1, "measuring the nets")
        measured = {i: of_net for (i, _), (of_net,) in of_nets.items()}
        bits = _all(pool, partial(EvalWorker.bits, measured=measured), bounded, num_held_out, "bits/dim")
        parts = _all(pool, EvalWorker.draw, samplings, settings.num_images, "images sampled")
    drawn = {key: Sampled(*map(np.concatenate, zip(*of_key, strict=True))) for key, of_key in parts.items()}
    near = _near(context, drawn)
    results = []
    for i, candidate in enumerate(candidates):
        terms = np.concatenate(bits.get((i, None), [np.empty((0, 3))]))
        sampled = [(s, images.features, *near[j, s]) for (j, s), images in drawn.items() if j == i]
        results.append(_result(candidate, context, settings, terms, sampled))
    return Report(_about(context, settings), tuple(results))


def _all(
    pool: WorkerPool[EvalWorker],
    call: Callable[[EvalWorker, Piece], T],
    keys: Sequence[K],
    num_images: int,
    what: str,
) -> dict[K, list[T]]:
    """The results of `num_images` images of each candidate (and sampling configuration), by piece, in order."""
    pieces = [Piece(key[0], key[1], start, stop) for key in keys for start, stop in _parts(num_images)]
    size = len(keys) * num_images
    results = dict(track(what, size, pool.map(call, pieces), lambda done: done[0].stop - done[0].start))
    return {key: [results[piece] for piece in pieces if piece[:2] == key] for key in keys}


def _near(
    context: EvalContext, drawn: Mapping[tuple[int, SampleConfig], Sampled]
) -> dict[tuple[int, SampleConfig], tuple[tuple[NearerShare, ...], bytes]]:
    """Shares of sampled images that are near training images, and a picture of the nearest pairs."""
    if not context.num_train:
        return dict.fromkeys(drawn, ((), b""))
    sampled = drawn.values()
    held_out = images_of(context.held_out, 0, min(len(context.real), MAX_PAIRWISE)).image
    train = context.train.parts(context.train.plan(0, WINDOW_ROWS), 0, context.num_train, BLOCK_IMAGES)
    train = track("training images searched", context.num_train, train, lambda part: len(part.image))
    blocks = (part.image for part in train)
    spaces = {"pixels": memorisation.nearest([held_out, *(images.image for images in sampled)], blocks)}
    if context.train_features is not None:
        features = [context.real, *(images.features for images in sampled)]
        starts = range(0, len(context.train_features), BLOCK_IMAGES)
        train_features = (context.train_features[i : i + BLOCK_IMAGES] for i in starts)
        nearest = memorisation.nearest([values[:MAX_PAIRWISE] for values in features], train_features)
        spaces = {context.feature_net.name: nearest, **spaces}
    first = next(iter(spaces))

    def train_at(position: int) -> Pixels:
        return images_of(context.train, position, position + 1).image[0]

    near = {}
    for i, (key, images) in enumerate(drawn.items()):
        sides = {name: (ours[i], of_held_out) for name, (of_held_out, *ours) in spaces.items()}
        shares = tuple(nearer_share(name, *both, context.num_train) for name, both in sides.items())
        near[key] = shares, plots.nearest(first, *sides[first], images.image, train_at)
    return near


def _result(
    candidate: Candidate,
    context: EvalContext,
    settings: Settings,
    terms: NDArray[np.float64],
    sampled: Iterable[tuple[SampleConfig, Features, tuple[NearerShare, ...], bytes]],
) -> CheckpointResult:
    config, position = candidate.config, candidate.position
    own = replace(resolved(config, config.sample), seed=settings.seed)
    label = labels_at(context.label, range(settings.num_images)) if config.model.num_classes else None
    drawn = []
    for sample, features, shares, picture in sampled:
        scores = score(context.feature_net.name, features, context.real, context.other_real, label)
        drawn.append(SampledScores(sample, sample == own, (*scores, *shares), picture))
    has_bound = len(terms) > 0
    return CheckpointResult(
        checkpoint=candidate.uri,
        weights_sha256=candidate.weights_sha256,
        run=candidate.run,
        run_key=position.get("run_key", ""),
        experiment=config.run.experiment,
        images_seen=position["images_seen"],
        saw_this_data=position.get("data_fingerprint") == context.train.rows.fingerprint,
        variance=bits_per_dim.bound_variance(config, settings.variance) if has_bound else "",
        variance_is_default=settings.variance == "auto",
        bits=tuple(bound_scores(terms)) if has_bound else (),
        drawn=tuple(drawn),
        num_classes=config.model.num_classes,
        bits_of_image=tuple(terms.sum(1).round(6).tolist()),
    )


def _about(context: EvalContext, settings: Settings) -> dict[str, Any]:
    """Everything that the results depend on, except for the checkpoints and the sampling configurations."""
    return {
        "num_images": settings.num_images,
        "seed": settings.seed,
        "generator": GENERATOR,
        "features": {key: getattr(context.feature_net, key) for key in ("name", "size", "digest")},
        "num_train_images": context.num_train,
        "bits_per_dim": {"timesteps": settings.num_draws or "all"},
        **({"labels": "as held out"} if context.held_out.manifest.class_names else {}),
        "data": {
            "shards": context.train.location.uri,
            "split": context.held_out.split,
            "num_images": context.held_out.rows.num_rows,
            "fingerprint": context.held_out.rows.fingerprint,
            "grey_levels": grey_levels(context.held_out, settings.num_images),
        },
    }


def grey_levels(held_out: DataSet, num_images: int) -> int:
    """The number of different pixel values of the images whose bound is computed."""
    parts = _parts(min(num_images, held_out.rows.num_rows))
    levels = [np.unique(images_of(held_out, start, stop).image) for start, stop in parts]
    return len(np.unique(np.concatenate(levels)))


def _parts(num_images: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_images, PIECE_IMAGES):
        yield start, min(start + PIECE_IMAGES, num_images)
