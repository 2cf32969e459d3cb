"""From checkpoints to a report, in pieces that any number of workers may share.

Its own room because judgement.py judges a batch, and here is who judges which. A piece is a range of images whose
place does not depend on the workers, and pieces are put together in order.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddpm import generation, judgement
from ddpm.config import SampleConfig
from ddpm.data.reading import DataSet
from ddpm.evaluation.bits import BitsPerDim
from ddpm.evaluation.features import FeatureNet, Features
from ddpm.evaluation.reference import images_of
from ddpm.evaluation.scores import score
from ddpm.fleet import Fleet
from ddpm.judgement import PIECE_IMAGES
from ddpm.progress import Display
from ddpm.report import Drawn, Report, Verdict
from ddpm.yardstick import Candidate, Settings, Yardstick, choose, resolved, ways_of

T = TypeVar("T")


class Piece(NamedTuple):
    """Images start..stop-1 of a candidate, drawn in its way of that number (held-out images: 0)."""

    candidate: int
    way: int
    start: int
    stop: int


class Bench:
    """What a worker holds: all candidates, and what they are judged by."""

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
        self._candidates = [
            (c.net.to(device), c.config, generation.build_objective(c.config)) for c in candidates
        ]

    def proposal(self, candidate: int) -> Tensor:
        """[T]: the timesteps at which this candidate's bound had better be measured."""
        net, config, objective = self._candidates[candidate]
        pilot, variance = images_of(self._train, 0, judgement.PILOT_IMAGES), config.sample.variance
        return judgement.proposal(net, config, objective, pilot, device=self._device, variance=variance)

    def bits(self, piece: Piece, proposal: Tensor | None) -> BitsPerDim:
        """The bound of held-out images."""
        net, config, objective = self._candidates[piece.candidate]
        return judgement.bits_per_dim(
            net,
            config,
            objective,
            images_of(self._held_out, piece.start, piece.stop),
            start=piece.start,
            device=self._device,
            variance=config.sample.variance,
            proposal=proposal,
            num_draws=self._settings.num_draws,
            seed=self._settings.seed,
        )

    def draw(self, piece: Piece) -> Features:
        """The features of images that are drawn."""
        posed, indices = self._candidates[piece.candidate], range(piece.start, piece.stop)
        sample = self._ways[piece.candidate][piece.way]
        return judgement.drawn_features(
            *posed, self._feature_net, indices, device=self._device, sample=sample
        )


def evaluate(candidates: Sequence[Candidate], settings: Settings, num_workers: int | None = None) -> Report:
    """Judge all candidates by the same held-out images.

    Args:
        num_workers: of the fleet; no number depends on it.

    Raises:
        UserError: the settings do not fit the candidates, or there are no images to judge them by.
    """
    ways = [ways_of(candidate.config, settings) for candidate in candidates]
    by = choose(candidates, settings)
    bench = partial(Bench, candidates, ways, by.train, by.held_out, by.feature_net, settings)
    with Fleet(bench, num_workers) as fleet:
        bits = _bits(fleet, candidates, settings, min(settings.num_images, by.held_out.rows.num_rows))
        drawn = _drawn(fleet, ways, settings.num_images)
    verdicts = (
        _verdict(candidate, by, settings, bits.get(i), zip(ways[i], drawn[i], strict=True))
        for i, candidate in enumerate(candidates)
    )
    return Report(_about(by, settings), tuple(verdicts))


def _bits(
    fleet: Fleet[Bench], candidates: Sequence[Candidate], settings: Settings, num_images: int
) -> dict[int, BitsPerDim]:
    """By candidate; those of a process that has no bound are not there."""
    bound = [i for i, candidate in enumerate(candidates) if candidate.config.objective.process == "gaussian"]
    proposals: dict[int, Tensor] = {}
    if settings.num_draws:
        with Display("choosing timesteps", len(bound)) as display:
            for candidate, proposal in fleet.map(Bench.proposal, bound):
                proposals[candidate] = proposal
                display.update(len(proposals))
    pieces = [Piece(i, 0, *part) for i in bound for part in _parts(num_images)]
    done = _watched("bits/dim", fleet.map(partial(_bits_of, proposals=proposals), pieces), pieces)
    return {i: BitsPerDim.merge(*(done[piece] for piece in pieces if piece.candidate == i)) for i in bound}


def _bits_of(bench: Bench, piece: Piece, proposals: Mapping[int, Tensor]) -> BitsPerDim:
    return bench.bits(piece, proposals.get(piece.candidate))


def _drawn(
    fleet: Fleet[Bench], ways: Sequence[Sequence[SampleConfig]], num_images: int
) -> list[list[Features]]:
    """The features of the images drawn, by candidate and way."""
    places = [[(i, way) for way in range(len(of_candidate))] for i, of_candidate in enumerate(ways)]
    pieces = [Piece(*place, *part) for row in places for place in row for part in _parts(num_images)]
    done = _watched("images drawn", fleet.map(Bench.draw, pieces), pieces)
    return [
        [Features.merge(*(done[piece] for piece in pieces if piece[:2] == place)) for place in row]
        for row in places
    ]


def _watched(what: str, results: Iterator[tuple[Piece, T]], pieces: Sequence[Piece]) -> dict[Piece, T]:
    """The results of all pieces, while a bar counts their images."""
    found, num_done = {}, 0
    with Display(what, sum(piece.stop - piece.start for piece in pieces)) as display:
        for piece, result in results:
            found[piece], num_done = result, num_done + piece.stop - piece.start
            display.update(num_done)
    return found


def _verdict(
    candidate: Candidate,
    by: Yardstick,
    settings: Settings,
    bits: BitsPerDim | None,
    drawn: Iterable[tuple[SampleConfig, Features]],
) -> Verdict:
    config, position = candidate.config, candidate.position
    own = replace(resolved(config, config.sample), seed=settings.seed)
    return Verdict(
        checkpoint=candidate.uri,
        weights_sha256=candidate.weights_sha256,
        run=candidate.run,
        run_key=position.get("run_key", ""),
        experiment=config.run.experiment,
        images_seen=position["images_seen"],
        saw_this_data=position.get("data_fingerprint") == by.train.rows.fingerprint,
        bits=tuple(bits.scores()) if bits else (),
        drawn=tuple(
            Drawn(way, way == own, tuple(score(by.feature_net.name, features, by.real, by.other_real)))
            for way, features in drawn
        ),
        num_classes=config.model.num_classes,
    )


def _about(by: Yardstick, settings: Settings) -> dict[str, Any]:
    """What the numbers depend on, but for the checkpoints and the ways of drawing."""
    return {
        "num_images": settings.num_images,
        "seed": settings.seed,
        "features": {key: getattr(by.feature_net, key) for key in ("name", "size", "digest")},
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
    """The number of different values that the pixels have of the images whose bound is taken."""
    parts = _parts(min(num_images, held_out.rows.num_rows))
    found = [np.unique(images_of(held_out, start, stop).image) for start, stop in parts]
    return len(np.unique(np.concatenate(found)))


def _parts(num_images: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_images, PIECE_IMAGES):
        yield start, min(start + PIECE_IMAGES, num_images)
