"""Evaluation of checkpoints in pieces, on any number of workers.

A piece is a range of images, independent of the workers; the results of pieces are merged in order. Nothing is written
but the cache of features (inputs.py); save_results.py writes the results.

Axes: N generated images, M held-out images.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.config import kinds
from ddpm.config.tree import SampleConfig
from ddpm.data.reading import DataSet, LabelledImages
from ddpm.evaluation import bits_per_dim, memorisation
from ddpm.evaluation.bits_per_dim import PIECE_IMAGES, NetErrors, bound_score
from ddpm.evaluation.feature_scores import MAX_PAIRWISE, score_features
from ddpm.evaluation.features import FeatureNet, Features, features_of, images_of
from ddpm.evaluation.inputs import (
    Candidate,
    Reference,
    check_effect,
    prepare_reference,
    resolved,
    sampling_config,
)
from ddpm.evaluation.memorisation import Memorised
from ddpm.evaluation.settings import Settings
from ddpm.runs.evaluations import CheckpointResult, Report, SampledScores
from ddpm.sampling import generate
from ddpm.sampling.pool import WorkerPool
from ddpm.utils.images import Pixels
from ddpm.utils.progress import track
from ddpm.utils.seeding import GENERATOR

P = TypeVar("P", bound="Piece")
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Images start..stop-1 of a candidate."""

    candidate: int
    start: int
    stop: int


@dataclass(frozen=True)
class HeldOutPiece(Piece):
    """Held-out images whose bound is measured."""

    images: LabelledImages = field(repr=False)


class Sampled(NamedTuple):
    """Images of one candidate."""

    features: Features
    image: Pixels
    """uint8 [N, H, W, C]: the first MAX_PAIRWISE; none if no nearest training images are searched."""


@dataclass
class EvalWorker:
    """The state of a worker: all candidates, and how they are measured. It reads no data set."""

    device: torch.device
    candidates: Sequence[Candidate]
    feature_net: FeatureNet
    settings: Settings
    held_out_label: NDArray[np.int64] | None

    def __post_init__(self) -> None:
        for candidate in self.candidates:
            candidate.net.to(self.device)

    def measure_errors(self, piece: Piece, train: LabelledImages) -> NetErrors:
        """Errors of the candidate of a piece, on training images that do not depend on the piece."""
        return bits_per_dim.measure_errors(self.candidates[piece.candidate], train)

    def bound_terms(self, piece: HeldOutPiece, errors: Mapping[int, NetErrors]) -> NDArray[np.float64]:
        """The bound of the held-out images of a piece.

        Args:
            errors: those of each candidate.
        """
        return bits_per_dim.bound_terms(
            self.candidates[piece.candidate],
            errors[piece.candidate],
            piece.images,
            start=piece.start,
            num_draws=self.settings.num_draws,
            seed=self.settings.seed,
        )

    def draw(self, piece: Piece) -> Sampled:
        """Sample the images of a piece."""
        indices = range(piece.start, piece.stop)
        label = labels_at(self.held_out_label, indices)
        image = generate.draw(self.candidates[piece.candidate], indices, label=label)
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
    samples = [sampling_config(candidate.config, settings) for candidate in candidates]
    sampled_with = [
        candidate.sampled_with(sample) for candidate, sample in zip(candidates, samples, strict=True)
    ]
    check_effect((candidate.config for candidate in sampled_with), settings)
    reference = prepare_reference(candidates, settings)  # takes minutes if it trains the classifier
    everyone = range(len(candidates))
    bounded = [
        i for i in everyone if bounds and kinds.objective(candidates[i].config.objective.process).has_bound
    ]
    make_worker = partial(
        EvalWorker,
        candidates=sampled_with,
        feature_net=reference.feature_net,
        settings=settings,
        held_out_label=reference.label,
    )
    with WorkerPool(make_worker, num_workers) as pool:
        terms = _bound_terms(pool, bounded, reference, settings.num_images) if bounded else {}
        pieces = [Piece(i, start, stop) for i in everyone for start, stop in _ranges(settings.num_images)]
        total = settings.num_images * len(candidates)
        drawn = _results(pool, EvalWorker.draw, pieces, total, "images sampled")
    sampled = [_joined(drawn[i]) for i in everyone]
    memorised = _memorised(reference, sampled)
    results = []
    for i, candidate in enumerate(candidates):
        scores = _sampled_scores(candidate, samples[i], sampled[i].features, memorised[i], reference)
        of_candidate = np.concatenate(terms[i]) if i in terms else None
        results.append(_result(candidate, of_candidate, scores, reference.train))
    return Report(_settings(reference, settings), tuple(results))


def _bound_terms(
    pool: WorkerPool[EvalWorker], candidates: Sequence[int], reference: Reference, num_images: int
) -> dict[int, list[NDArray[np.float64]]]:
    """Each candidate's bound of the held-out images, `num_images` at most, in parts."""
    train = images_of(reference.train, 0, bits_per_dim.MEASURED_IMAGES)
    measure_errors = partial(EvalWorker.measure_errors, train=train)
    nets = [Piece(i, 0, 1) for i in candidates]
    measured = _results(pool, measure_errors, nets, len(nets), "measuring the nets")
    errors = {i: parts[0] for i, parts in measured.items()}
    num_images = min(num_images, reference.held_out.rows.num_rows)
    pieces = _held_out_pieces(reference.held_out, candidates, num_images)
    bound_terms = partial(EvalWorker.bound_terms, errors=errors)
    return _results(pool, bound_terms, pieces, num_images * len(candidates), "bits/dim")


def _held_out_pieces(held_out: DataSet, candidates: Sequence[int], num_images: int) -> Iterator[HeldOutPiece]:
    """The pieces of all candidates, in the order of the images: these are read once."""
    reader = held_out.fixed_order()
    for start, stop in _ranges(num_images):
        images = reader.read(start, stop)
        for i in candidates:
            yield HeldOutPiece(i, start, stop, images)


def _ranges(num_images: int) -> list[tuple[int, int]]:
    starts = range(0, num_images, PIECE_IMAGES)
    return [(start, min(start + PIECE_IMAGES, num_images)) for start in starts]


def _results(
    pool: WorkerPool[EvalWorker],
    work: Callable[[EvalWorker, P], T],
    pieces: Iterable[P],
    num_images: int,
    what: str,
) -> dict[int, list[T]]:
    """The results of each candidate's pieces in order, with a display of how many of all images are done."""
    found: dict[int, dict[int, T]] = {}
    done = pool.map(work, pieces)
    for piece, result in track(what, num_images, done, lambda each: each[0].stop - each[0].start):
        found.setdefault(piece.candidate, {})[piece.start] = result
    return {i: [parts[start] for start in sorted(parts)] for i, parts in found.items()}


def _joined(parts: Sequence[Sampled]) -> Sampled:
    """The images of all pieces of a candidate."""
    features = np.concatenate([part.features for part in parts])
    image = np.concatenate([part.image for part in parts])
    return Sampled(features, image)


def _memorised(reference: Reference, sampled: Sequence[Sampled]) -> list[Memorised]:
    """The nearest training images of each candidate's images, unless they are not searched."""
    if not reference.num_train:
        return [Memorised()] * len(sampled)
    image = [images.image for images in sampled]
    features = [images.features for images in sampled]
    return memorisation.search(reference, image, features)


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
    candidate: Candidate, terms: NDArray[np.float64] | None, drawn: SampledScores, train: DataSet
) -> CheckpointResult:
    """The results of a candidate; its terms are [M, 3], None: it has no bound."""
    state = candidate.state
    return CheckpointResult(
        checkpoint=candidate.uri,
        weights_sha256=candidate.weights_sha256,
        run=candidate.run,
        run_key=state.get("run_key", ""),
        images_seen=state["images_seen"],
        saw_this_data=state.get("data_fingerprint") == train.rows.fingerprint,
        bits=None if terms is None else bound_score(terms, candidate.config.data.latents),
        drawn=drawn,
        bits_of_image=() if terms is None else tuple(terms.sum(axis=1).round(6).tolist()),
    )


def _settings(reference: Reference, settings: Settings) -> dict[str, Any]:
    """Everything that the results depend on, except for the checkpoints and the sampling configurations."""
    net = reference.feature_net
    held_out = reference.held_out_images
    return {
        "num_images": settings.num_images,
        "seed": settings.seed,
        "generator": GENERATOR,
        "features": {"name": net.name, "size": net.size, "digest": net.digest},
        "num_train_images": reference.num_train,
        "bits_per_dim": {"timesteps": settings.num_draws or "all"},
        "data": {"split": held_out.split, "fingerprint": held_out.rows.fingerprint},
    }
