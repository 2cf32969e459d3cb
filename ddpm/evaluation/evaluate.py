"""Evaluation of checkpoints in pieces, on any number of workers.

A piece is a range of images, independent of the workers; the results of pieces are merged in order.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ddpm.build import build_objective
from ddpm.cluster.worker_pool import WorkerPool
from ddpm.config import SampleConfig
from ddpm.data.reading import DataSet, Images
from ddpm.diffusion.objectives import PROCESSES
from ddpm.evaluation import measure, memorisation, plots
from ddpm.evaluation.bits import BitsPerDim
from ddpm.evaluation.context import Candidate, EvalContext, Settings, choose, resolved, ways_of
from ddpm.evaluation.features import FeatureNet, Features
from ddpm.evaluation.measure import PIECE_IMAGES, Measured
from ddpm.evaluation.memorisation import BLOCK_IMAGES, NearerShare, Pairs, nearer_share, nearest_pairs
from ddpm.evaluation.reference import WINDOW_ROWS, images_of
from ddpm.evaluation.report import CheckpointResult, Drawn, Report
from ddpm.evaluation.scores import MAX_PAIRWISE, score
from ddpm.hub import resolve
from ddpm.sampling import generate
from ddpm.utils.images import Pixels
from ddpm.utils.progress import Display
from ddpm.utils.seeding import GENERATOR

T = TypeVar("T")


class Piece(NamedTuple):
    """Images start..stop-1 of a candidate, sampled in its way number `way` (held-out images: 0)."""

    candidate: int
    way: int
    start: int
    stop: int


class Sampled(NamedTuple):
    """Images sampled in one way."""

    features: Features
    image: Pixels
    """uint8 [N, H, W, C]: the first MAX_PAIRWISE of the way; none if no nearest training images are searched."""


class Nearness(NamedTuple):
    """Distances of the images of one way to training images."""

    shares: tuple[NearerShare, ...] = ()
    """In the feature net's space and in pixels."""
    pairs: Pairs | None = None
    """The nearest pairs, in the feature net's space."""


class EvalWorker:
    """The state of a worker: all candidates, and the data they are compared with."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        ways: Sequence[Sequence[SampleConfig]],
        train: DataSet,
        held_out: DataSet,
        feature_net: FeatureNet,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self._ways, self._train, self._held_out = ways, train, held_out
        self._feature_net, self._settings, self._device = feature_net, settings, device
        self._candidates = [(c.net.to(device), c.config, build_objective(c.config)) for c in candidates]

    def measure(self, candidate: int) -> Measured:
        """Errors of this candidate on training images."""
        net, config, objective = self._candidates[candidate]
        train = images_of(self._train, 0, measure.MEASURED_IMAGES)
        variance = measure.bound_variance(config, self._settings.variance)
        return measure.measure(net, config, objective, train, variance, device=self._device)

    def bits(self, piece: Piece, measured: Mapping[int, Measured]) -> BitsPerDim:
        """The bound of the held-out images of a piece."""
        net, config, objective = self._candidates[piece.candidate]
        return measure.bits_per_dim(
            net,
            config,
            objective,
            images_of(self._held_out, piece.start, piece.stop),
            start=piece.start,
            device=self._device,
            variance=measure.bound_variance(config, self._settings.variance),
            measured=measured[piece.candidate],
            num_draws=self._settings.num_draws,
            seed=self._settings.seed,
        )

    def draw(self, piece: Piece, measured: Mapping[int, Measured]) -> Sampled:
        """Sample the images of a piece."""
        features, image = measure.drawn_features(
            *self._candidates[piece.candidate],
            self._feature_net,
            range(piece.start, piece.stop),
            device=self._device,
            sample=self._ways[piece.candidate][piece.way],
            x_0_error=measured[piece.candidate].x_0_error if piece.candidate in measured else None,
        )
        kept = MAX_PAIRWISE if self._settings.num_train_images else 0
        return Sampled(features, image[: max(0, kept - piece.start)])


def evaluate(candidates: Sequence[Candidate], settings: Settings, num_workers: int | None = None) -> Report:
    """Evaluate all candidates with the same held-out images.

    Args:
        num_workers: size of the pool; results do not depend on it.

    Raises:
        UserError: the settings do not fit the candidates, or there are no held-out images.
    """
    ways = [ways_of(candidate.config, settings) for candidate in candidates]
    by = choose(candidates, settings)
    worker = partial(EvalWorker, candidates, ways, by.train, by.held_out, by.feature_net, settings)
    with WorkerPool(worker, num_workers) as pool:
        measured = _measured(pool, candidates)
        bits = _bits(pool, measured, min(settings.num_images, by.held_out.rows.num_rows))
        drawn = _drawn(pool, ways, measured, settings.num_images)
    nearnesses, results = _nearnesses(by, drawn), []
    for i, candidate in enumerate(candidates):
        found = ((way, drawn[i, k], nearnesses[i, k]) for k, way in enumerate(ways[i]))
        results.append(_result(candidate, by, settings, bits.get(i), found))
    return Report(_about(by, settings), tuple(results))


def _measured(pool: WorkerPool[EvalWorker], candidates: Sequence[Candidate]) -> dict[int, Measured]:
    """Errors by candidate, also stored beside its weights; candidates without a bound are left out."""
    bound = [i for i, c in enumerate(candidates) if PROCESSES[c.config.objective.process].has_bound]
    found: dict[int, Measured] = {}
    with Display("measuring the nets", len(bound)) as display:
        for i, measured in pool.map(EvalWorker.measure, bound):
            if bool(measured.x_0_error.isfinite().all()):
                resolve.keep_x_0_error(candidates[i].uri, candidates[i].weights_sha256, measured.x_0_error)
            found[i] = measured
            display.update(len(found))
    return found


def _bits(
    pool: WorkerPool[EvalWorker], measured: Mapping[int, Measured], num_images: int
) -> dict[int, BitsPerDim]:
    """Bits/dim by candidate."""
    pieces = [Piece(i, 0, *part) for i in sorted(measured) for part in _parts(num_images)]
    done = _watched("bits/dim", pool.map(partial(EvalWorker.bits, measured=measured), pieces), pieces)
    return {i: BitsPerDim.merge(*(done[piece] for piece in pieces if piece.candidate == i)) for i in measured}


def _drawn(
    pool: WorkerPool[EvalWorker],
    ways: Sequence[Sequence[SampleConfig]],
    measured: Mapping[int, Measured],
    num_images: int,
) -> dict[tuple[int, int], Sampled]:
    """The sampled images, by candidate and way."""
    places = [(i, way) for i, of_candidate in enumerate(ways) for way in range(len(of_candidate))]
    pieces = [Piece(*place, *part) for place in places for part in _parts(num_images)]
    done = _watched("images sampled", pool.map(partial(EvalWorker.draw, measured=measured), pieces), pieces)
    return {place: _joined([done[piece] for piece in pieces if piece[:2] == place]) for place in places}


def _joined(parts: Sequence[Sampled]) -> Sampled:
    features, image = zip(*parts, strict=True)
    return Sampled(np.concatenate(features), np.concatenate(image))


def _nearnesses(by: EvalContext, drawn: Mapping[tuple[int, int], Sampled]) -> dict[tuple[int, int], Nearness]:
    """Distances of sampled images to training images, by candidate and way."""
    if not by.num_train:
        return dict.fromkeys(drawn, Nearness())
    ways = drawn.values()
    held_out = images_of(by.held_out, 0, min(len(by.real), MAX_PAIRWISE)).image
    train = by.train.parts(by.train.plan(0, WINDOW_ROWS), 0, by.num_train, BLOCK_IMAGES, "substitute")
    counted = _counted(train, by.num_train)
    spaces = {"pixels": memorisation.nearest([held_out, *(way.image for way in ways)], counted)}
    if by.train_features is not None:
        features = [by.real, *(way.features for way in ways)]
        train_features = memorisation.blocks(by.train_features)
        nearest = memorisation.nearest([values[:MAX_PAIRWISE] for values in features], train_features)
        spaces = {by.feature_net.name: nearest, **spaces}

    def nearness(way: int, image: Pixels) -> Nearness:
        found = {name: (of_ways[way], of_held_out) for name, (of_held_out, *of_ways) in spaces.items()}
        shares = tuple(nearer_share(name, *sides, by.num_train) for name, sides in found.items())
        name, sides = next(iter(found.items()))
        return Nearness(shares, nearest_pairs(name, *sides, image, by.train_image))

    return {place: nearness(i, way.image) for i, (place, way) in enumerate(drawn.items())}


def _counted(parts: Iterable[Images], num_images: int) -> Iterator[Pixels]:
    """The images of all parts, with a progress bar."""
    done = 0
    with Display("training images searched", num_images) as display:
        for part in parts:
            yield part.image
            done += len(part.image)
            display.update(done)


def _watched(what: str, results: Iterator[tuple[Piece, T]], pieces: Sequence[Piece]) -> dict[Piece, T]:
    """The results of all pieces, with a progress bar of their images."""
    found, num_done = {}, 0
    with Display(what, sum(piece.stop - piece.start for piece in pieces)) as display:
        for piece, result in results:
            found[piece], num_done = result, num_done + piece.stop - piece.start
            display.update(num_done)
    return found


def _result(
    candidate: Candidate,
    by: EvalContext,
    settings: Settings,
    bits: BitsPerDim | None,
    drawn: Iterable[tuple[SampleConfig, Sampled, Nearness]],
) -> CheckpointResult:
    config, position = candidate.config, candidate.position
    own = replace(resolved(config, config.sample), seed=settings.seed)
    label = generate.labels(config, range(settings.num_images)) if config.model.num_classes else None
    found = []
    for way, images, nearness in drawn:
        scores = score(by.feature_net.name, images.features, by.real, by.other_real, label)
        picture = plots.nearest(nearness.pairs) if nearness.pairs else b""
        found.append(Drawn(way, way == own, (*scores, *nearness.shares), picture))
    return CheckpointResult(
        checkpoint=candidate.uri,
        weights_sha256=candidate.weights_sha256,
        run=candidate.run,
        run_key=position.get("run_key", ""),
        experiment=config.run.experiment,
        images_seen=position["images_seen"],
        saw_this_data=position.get("data_fingerprint") == by.train.rows.fingerprint,
        variance=measure.bound_variance(config, settings.variance) if bits else "",
        variance_is_default=settings.variance == "auto",
        bits=tuple(bits.scores()) if bits else (),
        drawn=tuple(found),
        num_classes=config.model.num_classes,
    )


def _about(by: EvalContext, settings: Settings) -> dict[str, Any]:
    """Everything that the results depend on, except for the checkpoints and the ways of sampling."""
    return {
        "num_images": settings.num_images,
        "seed": settings.seed,
        "generator": GENERATOR,
        "features": {key: getattr(by.feature_net, key) for key in ("name", "size", "digest")},
        "num_train_images": by.num_train,
        "bits_per_dim": {"timesteps": settings.num_draws or "all"},
        "data": {
            "shards": by.uri,
            "split": by.held_out.split,
            "num_images": by.held_out.rows.num_rows,
            "fingerprint": by.held_out.rows.fingerprint,
            "grey_levels": _grey_levels(by.held_out, settings.num_images),
        },
    }


def _grey_levels(held_out: DataSet, num_images: int) -> int:
    """The number of different pixel values of the images whose bound is computed."""
    parts = _parts(min(num_images, held_out.rows.num_rows))
    found = [np.unique(images_of(held_out, start, stop).image) for start, stop in parts]
    return len(np.unique(np.concatenate(found)))


def _parts(num_images: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_images, PIECE_IMAGES):
        yield start, min(start + PIECE_IMAGES, num_images)
