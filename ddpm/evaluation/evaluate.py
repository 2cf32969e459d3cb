"""Evaluation of checkpoints in pieces, on any number of workers.

A piece is a range of images, independent of the workers; the results of pieces are merged in order. Nothing is written
but the cache of features (inputs.py); save_results.py writes the results.

Axes: N generated images, M held-out images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.config import kinds
from ddpm.config.tree import SampleConfig
from ddpm.data.reading import DataSet
from ddpm.evaluation import bits_per_dim, memorisation
from ddpm.evaluation.bits_per_dim import PIECE_IMAGES, NetErrors, bound_scores
from ddpm.evaluation.feature_scores import MAX_PAIRWISE, score_features
from ddpm.evaluation.features import FeatureNet, Features, features_of, images_of
from ddpm.evaluation.inputs import (
    Candidate,
    Reference,
    check_effect,
    prepare_reference,
    resolved,
    sampling_configs,
)
from ddpm.evaluation.memorisation import Memorised
from ddpm.evaluation.results import CheckpointResult, Report, SampledScores, Score
from ddpm.evaluation.settings import Settings
from ddpm.sampling import generate
from ddpm.sampling.pool import WorkerPool
from ddpm.utils.images import Pixels
from ddpm.utils.progress import track
from ddpm.utils.seeding import GENERATOR

T = TypeVar("T")
K = TypeVar("K")


class Sampling(NamedTuple):
    """A sampling configuration of a candidate."""

    candidate: int
    sample: SampleConfig


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

    device: torch.device
    candidates: Sequence[Candidate]
    train: DataSet
    held_out: DataSet
    feature_net: FeatureNet
    settings: Settings
    held_out_label: NDArray[np.int64] | None

    def __post_init__(self) -> None:
        for candidate in self.candidates:
            candidate.net.to(self.device)

    def measure_errors(self, piece: Piece) -> NetErrors:
        """Errors of the candidate of a piece, on training images that do not depend on the piece."""
        train = images_of(self.train, 0, bits_per_dim.MEASURED_IMAGES)
        return bits_per_dim.measure_errors(self.candidates[piece.candidate], train, self.settings.variance)

    def bound_terms(self, piece: Piece, errors: Mapping[int, NetErrors]) -> NDArray[np.float64]:
        """The bound of the held-out images of a piece.

        Args:
            errors: those of each candidate.
        """
        return bits_per_dim.bound_terms(
            self.candidates[piece.candidate],
            errors[piece.candidate],
            images_of(self.held_out, piece.start, piece.stop),
            start=piece.start,
            num_draws=self.settings.num_draws,
            seed=self.settings.seed,
        )

    def draw(self, piece: Piece) -> Sampled:
        """Sample the images of a piece."""
        assert piece.sample is not None
        trained = self.candidates[piece.candidate].sampled_with(piece.sample)
        indices = range(piece.start, piece.stop)
        image = generate.draw(trained, indices, label=labels_at(self.held_out_label, indices))
        kept = max(0, MAX_PAIRWISE - piece.start) if self.settings.num_train_images else 0
        return Sampled(features_of(self.feature_net, image), image[:kept].cpu().numpy())


def labels_at(held_out_label: NDArray[np.int64] | None, indices: range) -> NDArray[np.int64] | None:
    """[N]: the classes of sampled images, which are those of the held-out images, cycled."""
    if held_out_label is None:
        return None
    return held_out_label[np.array(indices) % len(held_out_label)]


def evaluate(
    candidates: Sequence[Candidate], settings: Settings, num_workers: int | None = None, bounds: bool = True
) -> Report:
    """Evaluate all candidates with the same held-out images.

    Args:
        num_workers: size of the pool; results do not depend on it.
        bounds: compute bits/dim, too, of nets that have a bound.
    """
    samplings = [
        Sampling(i, sample)
        for i, candidate in enumerate(candidates)
        for sample in sampling_configs(candidate.config, settings)
    ]
    check_effect((replace(candidates[i].config, sample=sample) for i, sample in samplings), settings)
    reference = prepare_reference(candidates, settings)  # takes minutes if it trains the classifier
    bounded = [
        i
        for i, candidate in enumerate(candidates)
        if bounds and kinds.objective(candidate.config.objective.process).has_bound
    ]
    num_held_out = min(settings.num_images, reference.held_out.rows.num_rows)
    make_worker = partial(
        EvalWorker,
        candidates=candidates,
        train=reference.train,
        held_out=reference.held_out,
        feature_net=reference.feature_net,
        settings=settings,
        held_out_label=reference.label,
    )
    with WorkerPool(make_worker, num_workers) as pool:
        errors = _errors(pool, bounded)
        terms = _terms(pool, bounded, errors, num_held_out)
        sampled = _sampled(pool, samplings, settings.num_images)
    memorised = _memorised(reference, sampled)
    results = []
    for i, candidate in enumerate(candidates):
        drawn = [
            _sampled_scores(
                candidate, sampling.sample, sampled[sampling].features, memorised[sampling], reference
            )
            for sampling in samplings
            if sampling.candidate == i
        ]
        results.append(_result(candidate, terms.get(i), drawn, reference.train, settings))
    return Report(_settings(reference, settings), tuple(results))


def _errors(pool: WorkerPool[EvalWorker], bounded: Sequence[int]) -> dict[int, NetErrors]:
    """The errors of each candidate that has a bound."""
    pieces = {i: [Piece(i, None, 0, 1)] for i in bounded}
    parts = _results(pool, EvalWorker.measure_errors, pieces, "measuring the nets")
    return {i: of_candidate[0] for i, of_candidate in parts.items()}


def _terms(
    pool: WorkerPool[EvalWorker], bounded: Sequence[int], errors: Mapping[int, NetErrors], num_held_out: int
) -> dict[int, NDArray[np.float64]]:
    """[M, 3]: the terms of the bound, of each candidate that has one."""
    pieces = {i: _pieces(i, None, num_held_out) for i in bounded}
    parts = _results(pool, partial(EvalWorker.bound_terms, errors=errors), pieces, "bits/dim")
    return {i: np.concatenate(of_candidate) for i, of_candidate in parts.items()}


def _sampled(
    pool: WorkerPool[EvalWorker], samplings: Sequence[Sampling], num_images: int
) -> dict[Sampling, Sampled]:
    """The images of each sampling configuration."""
    pieces = {sampling: _pieces(sampling.candidate, sampling.sample, num_images) for sampling in samplings}
    sampled = {}
    for sampling, parts in _results(pool, EvalWorker.draw, pieces, "images sampled").items():
        features = np.concatenate([part.features for part in parts])
        image = np.concatenate([part.image for part in parts])
        sampled[sampling] = Sampled(features, image)
    return sampled


def _pieces(candidate: int, sample: SampleConfig | None, num_images: int) -> list[Piece]:
    starts = range(0, num_images, PIECE_IMAGES)
    return [Piece(candidate, sample, start, min(start + PIECE_IMAGES, num_images)) for start in starts]


def _results(
    pool: WorkerPool[EvalWorker],
    work: Callable[[EvalWorker, Piece], T],
    pieces: Mapping[K, Sequence[Piece]],
    what: str,
) -> dict[K, list[T]]:
    """The results of the pieces of each key, with a display of how many images are done."""
    every = [piece for of_key in pieces.values() for piece in of_key]
    num_images = sum(piece.stop - piece.start for piece in every)
    done = dict(track(what, num_images, pool.map(work, every), lambda each: each[0].stop - each[0].start))
    return {key: [done[piece] for piece in of_key] for key, of_key in pieces.items()}


def _memorised(reference: Reference, sampled: Mapping[Sampling, Sampled]) -> dict[Sampling, Memorised]:
    """The nearest training images of each sampling configuration's images, unless they are not searched."""
    if not reference.num_train:
        return dict.fromkeys(sampled, Memorised())
    image = [images.image for images in sampled.values()]
    features = [images.features for images in sampled.values()]
    return dict(zip(sampled, memorisation.search(reference, image, features), strict=True))


def _sampled_scores(
    candidate: Candidate,
    sample: SampleConfig,
    features: Features,
    memorised: Memorised,
    reference: Reference,
) -> SampledScores:
    config = candidate.config
    own = replace(resolved(config, config.sample), seed=sample.seed)
    label = labels_at(reference.label, range(len(features))) if config.model.num_classes else None
    scores = score_features(
        net_name=reference.feature_net.name,
        generated=features,
        real=reference.real,
        other_real=reference.other_real,
        label=label,
    )
    return SampledScores(sample, sample == own, (*scores, *memorised.shares), memorised.picture)


def _result(
    candidate: Candidate,
    terms: NDArray[np.float64] | None,
    drawn: Sequence[SampledScores],
    train: DataSet,
    settings: Settings,
) -> CheckpointResult:
    config = candidate.config
    state = candidate.state
    variance = ""
    bits: list[Score] = []
    bits_of_image: list[float] = []
    if terms is not None:
        variance = bits_per_dim.bound_variance(config, settings.variance)
        bits = bound_scores(terms)
        bits_of_image = terms.sum(axis=1).round(6).tolist()
    return CheckpointResult(
        checkpoint=candidate.uri,
        weights_sha256=candidate.weights_sha256,
        run=candidate.run,
        run_key=state.get("run_key", ""),
        experiment=config.run.experiment,
        images_seen=state["images_seen"],
        saw_this_data=state.get("data_fingerprint") == train.rows.fingerprint,
        variance=variance,
        variance_is_default=settings.variance == "auto",
        bits=tuple(bits),
        drawn=tuple(drawn),
        num_classes=config.model.num_classes,
        bits_of_image=tuple(bits_of_image),
    )


def _settings(reference: Reference, settings: Settings) -> dict[str, Any]:
    """Everything that the results depend on, except for the checkpoints and the sampling configurations."""
    net = reference.feature_net
    held_out = reference.held_out
    found: dict[str, Any] = {
        "num_images": settings.num_images,
        "seed": settings.seed,
        "generator": GENERATOR,
        "features": {"name": net.name, "size": net.size, "digest": net.digest},
        "num_train_images": reference.num_train,
        "bits_per_dim": {"timesteps": settings.num_draws or "all"},
    }
    if held_out.manifest.class_names:
        found["labels"] = "as held out"
    found["data"] = {
        "shards": reference.train.location.uri,
        "split": held_out.split,
        "num_images": held_out.rows.num_rows,
        "fingerprint": held_out.rows.fingerprint,
        "grey_levels": grey_levels(held_out, settings.num_images),
    }
    return found


def grey_levels(held_out: DataSet, num_images: int) -> int:
    """The number of different pixel values of the images whose bound is computed."""
    levels: set[int] = set()
    for piece in _pieces(0, None, min(num_images, held_out.rows.num_rows)):
        levels.update(np.unique(images_of(held_out, piece.start, piece.stop).image).tolist())
    return len(levels)
