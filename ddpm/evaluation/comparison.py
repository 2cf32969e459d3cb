"""Comparison of runs: settings that differ, curves, ranks with ties.

Scores are compared among runs that were evaluated alike: the same held-out images, number of images, feature net and
seed. Training losses are shown but not ranked: losses of different schedules are not comparable.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ddpm.evaluation.compared_run import ERRORS, RATE, ComparedRun, Point
from ddpm.evaluation.memorisation import NearerShare
from ddpm.evaluation.ranking import Rank, ranks
from ddpm.evaluation.report import CheckpointResult, Drawn, Report
from ddpm.evaluation.scores import Score

RUN_KEYS = ("run.name", "run.storage")
"""Settings that only name or locate a run."""
NO_EFFECT_ON_SCORES = ("num_train_images",)
"""Settings of an evaluation that do not affect the ranked scores."""
RANKED = ("bits/dim", "KID", "FID")
"""Metrics that are ranked; lower is better."""
LOSSES = ("train/loss", "held_out/loss")
MAX_GRIDS = 12
"""Largest number of slider positions."""


class Cell(NamedTuple):
    """A run's score in a ranking."""

    value: float
    error: float
    images_seen: int
    rank: Rank


@dataclass(frozen=True)
class Ranking:
    """One metric of the runs that were evaluated alike."""

    title: str
    cells: Mapping[str, Cell]
    """By run key."""
    note: str = ""
    floor: float | None = None
    """Value of real images against real images."""


@dataclass(frozen=True)
class Chart:
    """Curves of one metric."""

    title: str
    x_label: str
    curves: Mapping[tuple[str, str], Sequence[tuple[float, float, float]]]
    """By run key and sampler (empty: none): x, value, and standard error, 0 if unknown."""
    is_log_x: bool = False
    is_log_y: bool = False
    floor: float | None = None


@dataclass
class Result:
    """All scores of a checkpoint, from evaluations with the same settings."""

    bits: Sequence[Score] = ()
    ways: dict[str, Drawn] = field(default_factory=dict)
    """Ways of sampling, by name."""


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[str | None]]:
    """Settings whose values differ, with the value of each run; None: the run has no such setting."""
    known = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for settings in known for key in settings)
    return {
        key: [run.settings.get(key) for run in runs]
        for key in keys
        if key not in RUN_KEYS and len({settings.get(key) for settings in known}) > 1
    }


def shared_positions(runs: Sequence[ComparedRun]) -> list[int]:
    """Positions of grids, of any run, ascending: at most MAX_GRIDS, evenly chosen, with the last one."""
    at = sorted({position for run in runs for position in run.grids})
    if len(at) <= MAX_GRIDS:
        return at
    return [at[round((i + 1) * len(at) / MAX_GRIDS) - 1] for i in range(MAX_GRIDS)]


def results_alike(runs: Sequence[ComparedRun]) -> dict[str, dict[int, Result]]:
    """Results by run key and images seen, with the evaluation settings that most runs share."""
    keys = {run.key for run in runs}
    groups: dict[str, dict[str, dict[int, Result]]] = {}
    reports = {id(report): report for run in runs for report in run.evaluations}
    for report in reports.values():
        for result in report.results:
            if result.run_key in keys:
                group = groups.setdefault(_how(report, result), {}).setdefault(result.run_key, {})
                merged = group.setdefault(result.images_seen, Result())
                merged.bits = result.bits or merged.bits
                for way in result.drawn:
                    if way.nearest or way.name not in merged.ways:
                        merged.ways[way.name] = way
    return max(groups.values(), key=lambda group: (len(group), sum(map(len, group.values()))), default={})


def rankings(runs: Sequence[ComparedRun], results: Mapping[str, Mapping[int, Result]]) -> list[Ranking]:
    """Ranks by each metric that at least two runs have, each at its newest evaluated checkpoint."""
    found: dict[str, dict[str, tuple[int, Score]]] = {}
    for run in runs:
        if of_run := results.get(run.key):
            at = max(of_run)
            for score in _scores(of_run[at]):
                found.setdefault(score.name, {})[run.key] = at, score
    made = [_ranking(name, cells) for name, cells in found.items() if len(cells) > 1]
    if made:
        return made
    for name in ERRORS:  # no evaluation: rank metrics logged during training
        last = {run.key: run.curves[name][-1] for run in runs if run.curves.get(name)}
        known = {key: point for key, point in last.items() if point.error}
        if len(known) > 1:
            scores = {key: (p.images_seen, Score(name, p.value, p.error, 0)) for key, p in known.items()}
            made.append(_ranking(name, scores))
    return made


def charts(runs: Sequence[ComparedRun], results: Mapping[str, Mapping[int, Result]]) -> Iterator[Chart]:
    """Curves over images seen, each followed by the same curves over hours of training."""
    curves: dict[str, dict[str, list[Point]]] = {}
    floors: dict[str, float | None] = {}
    for run in runs:
        for name, points in run.curves.items():
            if name != RATE:
                curves.setdefault(name, {})[run.key] = list(points)
        for at, result in sorted(results.get(run.key, {}).items()):
            for score in _scores(result):
                point = Point(at, score.value, score.error if math.isfinite(score.error) else 0.0)
                curves.setdefault(score.name, {}).setdefault(run.key, []).append(point)
                floors[score.name] = score.floor
    for title, of_runs in curves.items():
        how: dict[str, Any] = {"is_log_y": title in LOSSES, "floor": floors.get(title)}
        over_images = {
            (key, ""): [(float(p.images_seen), p.value, p.error) for p in points]
            for key, points in of_runs.items()
        }
        yield Chart(title, "images seen", over_images, **how)
        over_hours = {(run.key, ""): list(_over_hours(run, of_runs.get(run.key, ()))) for run in runs}
        if any(over_hours.values()):
            yield Chart(title, "hours of training", over_hours, **how)


def step_charts(runs: Sequence[ComparedRun], results: Mapping[str, Mapping[int, Result]]) -> Iterator[Chart]:
    """KID over the number of sampling steps, of checkpoints that were sampled with several numbers of them."""
    found: dict[str, dict[tuple[str, str], dict[int, Score]]] = {}
    for run in runs:
        several = {at: r for at, r in results.get(run.key, {}).items() if len(r.ways) > 1}
        for way in several[max(several)].ways.values() if several else ():
            for score in (score for score in way.scores if score.name.startswith("KID")):
                label, steps = (run.key, way.sample.sampler), way.sample.num_sample_steps or 0
                found.setdefault(score.name, {}).setdefault(label, {})[steps] = score
    for name, curves in found.items():
        points = {
            label: [(float(steps), s.value, s.error) for steps, s in sorted(scores.items())]
            for label, scores in curves.items()
        }
        if any(len(curve) > 1 for curve in points.values()):
            floors = [score.floor for scores in curves.values() for score in scores.values()]
            yield Chart(name, "sampling steps", points, is_log_x=True, floor=floors[0])


def nearest(result: Mapping[int, Result]) -> tuple[int, Drawn, NearerShare] | None:
    """The newest picture of nearest training images of a run: images seen, way of sampling, and its share."""
    for at in sorted(result, reverse=True):
        for way in (way for way in result[at].ways.values() if way.nearest):
            return at, way, next(score for score in way.scores if isinstance(score, NearerShare))
    return None


def _how(report: Report, result: CheckpointResult) -> str:
    """Everything that the ranked scores depend on, except the checkpoint."""
    settings: dict[str, Any] = {k: v for k, v in report.settings.items() if k not in NO_EFFECT_ON_SCORES}
    if isinstance(data := settings.get("data"), Mapping):  # the same images may be stored in two places
        settings["data"] = {key: value for key, value in data.items() if key != "shards"}
    return json.dumps([settings, result.variance_is_default or result.variance], sort_keys=True)


def _scores(result: Result) -> Iterator[Score]:
    """The ranked scores: bits/dim, and those of the run's own way of sampling, else of the way with most steps."""
    ways = sorted(result.ways.values(), key=lambda way: (way.is_own, way.sample.num_sample_steps or 0))
    for score in (*result.bits, *(score for way in ways[-1:] for score in way.scores)):
        is_ranked = score.n_real is not None and score.name.partition("-")[0] in RANKED
        if math.isfinite(score.value) and (is_ranked or score.name in RANKED):
            yield score


def _ranking(name: str, found: Mapping[str, tuple[int, Score]]) -> Ranking:
    values, errors = zip(*((score.value, score.error) for _, score in found.values()), strict=True)
    cells = {
        key: Cell(score.value, score.error, at, rank)
        for (key, (at, score)), rank in zip(found.items(), ranks(values, errors), strict=True)
    }
    return Ranking(name, cells, floor=next(score.floor for _, score in found.values()))


def _over_hours(run: ComparedRun, points: Sequence[Point]) -> Iterator[tuple[float, float, float]]:
    for point in points:
        if (hours := run.hours(point.images_seen)) is not None:
            yield hours, point.value, point.error
