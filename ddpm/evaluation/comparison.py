"""Comparison of runs: settings that differ, curves, ranks with ties, and the answer which run is better.

Scores are compared among runs that were evaluated alike: the same held-out images, number of images, feature net and
seed. Training losses are shown but not ranked: losses of different schedules are not comparable.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from ddpm.config import Affects, Config
from ddpm.config_io import keys_that_affect
from ddpm.evaluation.compared_run import ERRORS, RATE, ComparedRun, Remark
from ddpm.evaluation.feature_scores import MAX_PAIRWISE, Score
from ddpm.evaluation.memorisation import NearerShare
from ddpm.evaluation.plots import IMAGES_SEEN, STEPS, Chart, Point, charts_of
from ddpm.evaluation.ranking import Rank, paired_ranks, ranks
from ddpm.evaluation.results import CheckpointResult, Report, SampledScores
from ddpm.utils.command_line import installed

NO_EFFECT_ON_SCORES = ("num_train_images",)
"""Settings of an evaluation that do not affect the ranked scores."""
RANKED = ("bits/dim", "KID", "FID")
"""Metrics that are ranked; lower is better."""
ANSWERS = {
    "bits/dim": "held-out bits/dim",
    "held_out/bits_per_dim": "bits/dim of a few held-out images, in training",
}
"""Metrics besides KID that tell which run is better, and their names for people."""
UNLIKE_LABELS = "A net with labels bounds log p(x | y), a net without them log p(x)."
UNLIKE_DATA = "The runs were trained on different data, and each is judged by its own held-out images."
LOSSES = ("train/loss", "held_out/loss")
MAX_GRIDS = 12
"""Largest number of slider positions."""


Results = Mapping[str, Mapping[int, CheckpointResult]]
"""Results of evaluations with the same settings, by run key and images seen."""


class Cell(NamedTuple):
    """A run's score in a ranking."""

    value: float
    error: float
    images_seen: int
    rank: Rank
    n: int = 0
    """Held-out images."""
    of_image: Sequence[float] = ()
    """Values of the held-out images, if all runs have those of the same images."""


@dataclass(frozen=True)
class Ranking:
    """One metric of the runs that were evaluated alike."""

    title: str
    cells: Mapping[str, Cell]
    """By run key."""
    note: str = ""
    floor: float | None = None
    """Value of real images against real images."""
    is_comparable: bool = True
    """If not, `note` says why."""

    @property
    def name(self) -> str:
        """The metric's name for people."""
        return ANSWERS.get(self.title, self.title)

    @property
    def is_answer(self) -> bool:
        """Whether this metric tells which run is better."""
        return self.title in ANSWERS or self.title.startswith("KID")

    @property
    def has_winner(self) -> bool:
        """Whether one run is significantly better than each other one."""
        return any(cell.rank == Rank(1, 1) for cell in self.cells.values())

    def difference(self, first: str, second: str) -> tuple[float, float]:
        """The second run's value minus the first one's, and the standard error: image by image, where possible."""
        a, b = self.cells[first], self.cells[second]
        error = math.hypot(a.error, b.error)
        if a.of_image:
            each = np.subtract(b.of_image, a.of_image)
            error = float(each.std(ddof=1) / len(each) ** 0.5)
        return b.value - a.value, error


class Verdict(NamedTuple):
    """Which run is better by one metric."""

    metric: str
    headline: str
    detail: str
    has_winner: bool


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[str | None]]:
    """Settings whose values differ, with the value of each run; None: the run has no such setting."""
    known = [run.settings for run in runs if run.settings]
    locations = keys_that_affect(Config(), Affects.LOCATION)
    return {
        key: [run.settings.get(key) for run in runs]
        for key in dict.fromkeys(chain(*known))
        if key not in locations and len({settings.get(key) for settings in known}) > 1
    }


def shared_positions(runs: Sequence[ComparedRun]) -> list[int]:
    """Positions of grids, of any run, ascending: at most MAX_GRIDS, evenly chosen, with the last one."""
    at = sorted({position for run in runs for position in run.grids})
    if len(at) <= MAX_GRIDS:
        return at
    return [at[round((i + 1) * len(at) / MAX_GRIDS) - 1] for i in range(MAX_GRIDS)]


def results_alike(runs: Sequence[ComparedRun]) -> tuple[Results, int]:
    """The results with the evaluation settings that most runs share; of equals, most images; and their held-out images.

    Results of one checkpoint are merged.
    """
    newest = {run.key: run.images_seen for run in runs}
    groups: dict[str, dict[str, dict[int, CheckpointResult]]] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    reports = {id(report): report for run in runs for report in run.evaluations}
    for report in reports.values():
        for result in (result for result in report.results if result.run_key in newest):
            key = _evaluation_key(report, result)
            of_run = groups.setdefault(key, {}).setdefault(result.run_key, {})
            before = of_run.get(result.images_seen)
            of_run[result.images_seen] = _merged(before, result) if before else result
            settings[key] = report.settings

    def worth(key: str) -> tuple[int, ...]:
        group = groups[key]
        num_newest = sum(newest[run_key] in of_run for run_key, of_run in group.items())
        return len(group), num_newest, settings[key].get("num_images", 0), sum(map(len, group.values()))

    if not groups:
        return {}, 0
    best = max(groups, key=worth)
    return groups[best], settings[best]["data"].get("num_images", 0)


def _merged(before: CheckpointResult, result: CheckpointResult) -> CheckpointResult:
    """All scores of a checkpoint, from two evaluations with the same settings."""
    samplings = {sampling.name: sampling for sampling in before.drawn}
    for sampling in result.drawn:
        if sampling.nearest or sampling.name not in samplings:
            samplings[sampling.name] = sampling
    return replace(result if result.bits else before, drawn=tuple(samplings.values()))


def rankings(runs: Sequence[ComparedRun], results: Results) -> list[Ranking]:
    """Ranks by each metric that at least two runs have, each at its newest evaluated checkpoint."""
    scored: dict[str, dict[str, tuple[int, Score]]] = {}
    of_image = dict[str, Sequence[float]]()
    for run in runs:
        if of_run := results.get(run.key):
            at = max(of_run)
            of_image[run.key] = of_run[at].bits_of_image
            for score in _scores(of_run[at]):
                scored.setdefault(score.name, {})[run.key] = at, score
    if all(len(cells) < 2 for cells in scored.values()):  # rank metrics logged during training instead
        for name in ERRORS:
            last = {run.key: run.curves[name][-1] for run in runs if run.curves.get(name)}
            known = {key: point for key, point in last.items() if point.error}
            scored[name] = {k: (int(p.x), Score(name, p.value, p.error, 0)) for k, p in known.items()}
    is_of_unlike_data = len({run.data for run in runs if run.data}) > 1
    has_unlike_labels = len({run.settings.get("model.num_classes", "0") for run in runs if run.settings}) > 1
    ranked = []
    for name, cells in scored.items():
        if len(cells) > 1:
            ranking = _ranking(name, cells, of_image if name == "bits/dim" else {})
            if has_unlike_labels and name in ANSWERS:
                ranking = replace(ranking, note=UNLIKE_LABELS, is_comparable=False)
            if is_of_unlike_data and name in ERRORS:
                ranking = replace(ranking, note=UNLIKE_DATA, is_comparable=False)
            ranked.append(ranking)
    return ranked


def verdicts(rankings: Sequence[Ranking], names: Mapping[str, str]) -> Iterator[Verdict]:
    """Which run is better by bits/dim and by KID.

    Args:
        names: runs by key, as the text calls them.
    """
    for ranking in rankings:
        cells = ranking.cells
        if not ranking.is_answer or len(cells) < 2:
            continue
        if not ranking.is_comparable:
            yield Verdict(ranking.name, "Not comparable", ranking.note, False)
            continue
        first, second, *others = sorted(cells, key=lambda key: cells[key].value)
        if ranking.has_winner:
            headline = f"{names[first]} is better than {names[second]}"
            headline += " and all others" if others else ""
        else:
            tied = [names[key] for key in (first, second, *others) if cells[key].rank.best == 1]
            headline = f"No winner: {' and '.join(tied)} are tied" if len(tied) > 1 else "No winner"
        gap, error = ranking.difference(first, second)
        low, next_low = (f"{names[key]} has {cells[key].value:.4f}" for key in (first, second))
        where = "outside" if ranking.has_winner else "inside"
        detail = f"{low}, {next_low}; they differ by {gap:.4f} ± {error:.4f}, {where} the errors."
        if len({cell.images_seen for cell in cells.values()}) > 1:
            seen = ", ".join(f"{names[key]} at {cell.images_seen:,}" for key, cell in cells.items())
            detail += f" They were not evaluated at equal images seen: {seen}."
        yield Verdict(ranking.name, headline, detail, ranking.has_winner)


def next_step(
    runs: Sequence[ComparedRun],
    results: Results,
    num_held_out: int,
    rankings: Sequence[Ranking],
    names: Mapping[str, str],
) -> Remark | None:
    """What to run to know which run is better, or to know it better; None: that is known.

    Args:
        num_held_out: held-out images of the data set.
        names: as in `verdicts`.
    """
    runs = [run for run in runs if run.images_seen]
    evaluate = installed(shlex.join(["python", "jobs/evaluate.py", *(run.where for run in runs)]))
    if len({run.data for run in runs if run.data}) > 1:
        evaluate += f" --data.shards {shlex.quote(runs[0].settings.get('data.shards', 'DATA'))}"
    late = [run for run in runs if max(results.get(run.key, {}), default=-1) < run.images_seen]
    if late:
        who = ", ".join(names[run.key] for run in late)
        return Remark(
            f"Not evaluated alike at the newest checkpoint: {who}. Run this, and compare again:", evaluate
        )
    ties = [r for r in rankings if r.is_answer and r.is_comparable and not r.has_winner]
    if not runs or not ties:
        return None
    most_of_kid = min(num_held_out, MAX_PAIRWISE)
    cells = [(r.title.startswith("KID"), cell.n) for r in ties for cell in r.cells.values()]
    used = min(n for _, n in cells)
    if any(n < (most_of_kid if is_kid else num_held_out) for is_kid, n in cells):
        return Remark("More images make the errors smaller:", f"{evaluate} --num-images {4 * used}")
    tied = [run for run in runs if any(run.key in r.cells and r.cells[run.key].rank.best == 1 for r in ties)]
    again = [
        f"{run.command} --run.name {shlex.quote(f'{run.name}-again')} --train.seed {int(run.facts['seed']) + 1}"
        for run in tied
        if run.command
    ]
    return Remark(
        "All held-out images are used. Train those that are tied with another seed, too, and compare all:",
        "\n".join(again),
    )


def charts(runs: Sequence[ComparedRun], results: Results) -> Iterator[Chart]:
    """Curves over images seen, each followed by the same curves over the time of training; labels are (run key, "")."""
    shown: dict[str, Chart] = {}
    for run in runs:
        for name, points in run.curves.items():
            if name != RATE:
                chart = shown.setdefault(name, Chart(name, IMAGES_SEEN, {}, is_log_y=name in LOSSES))
                chart.curves[run.key, ""] = list(points)
    scored = (
        ((run.key, ""), at, score)
        for run in runs
        for at, result in sorted(results.get(run.key, {}).items())
        for score in _scores(result)
    )
    for chart in chain(shown.values(), charts_of(IMAGES_SEEN, scored).values()):
        yield chart
        over_time = {
            (run.key, ""): points
            for run in runs
            if (points := _over_hours(run, chart.curves.get((run.key, ""), ())))
        }
        if over_time:
            yield _in_minutes_if_short(replace(chart, x_label="hours of training", curves=over_time))


def step_charts(runs: Sequence[ComparedRun], results: Results) -> Iterator[Chart]:
    """KID over the number of sampling steps, of checkpoints that were sampled with several numbers of them.

    Labels are (run key, sampler). Of sampling configurations that differ in other settings, the last one is shown.
    """
    last: dict[tuple[float, str, str, str], Score] = {}
    for run in runs:
        several = {at: r for at, r in results.get(run.key, {}).items() if len(r.drawn) > 1}
        for sampling in several[max(several)].drawn if several else ():
            for score in (s for s in sampling.scores if s.is_finite and s.name.startswith("KID")):
                sample = sampling.sample
                last[sample.num_sample_steps or 0, run.key, sample.sampler, score.name] = score
    scored = (
        ((key, sampler), steps, last[steps, key, sampler, name]) for steps, key, sampler, name in sorted(last)
    )
    yield from (chart for chart in charts_of(STEPS, scored).values() if chart.has_curve)


def nearest(results: Mapping[int, CheckpointResult]) -> list[tuple[int, SampledScores, NearerShare]]:
    """The newest picture of nearest training images of a run, if any: images seen, its scores, and its share."""
    pictures = (
        (at, sampling, score)
        for at in sorted(results, reverse=True)
        for sampling in results[at].drawn
        for score in sampling.scores
        if sampling.nearest and isinstance(score, NearerShare)
    )
    return list(islice(pictures, 1))


def _evaluation_key(report: Report, result: CheckpointResult) -> str:
    """Everything that the ranked scores depend on, except the checkpoint."""
    settings: dict[str, Any] = {k: v for k, v in report.settings.items() if k not in NO_EFFECT_ON_SCORES}
    if isinstance(data := settings.get("data"), Mapping):  # the same images may be stored in two places
        settings["data"] = {key: value for key, value in data.items() if key != "shards"}
    return json.dumps([settings, result.variance_is_default or result.variance], sort_keys=True)


def _scores(result: CheckpointResult) -> Iterator[Score]:
    """The ranked scores: bits/dim, and those of the own sampling configuration, else of the one with most steps."""
    samplings = sorted(result.drawn, key=lambda drawn: (drawn.is_own, drawn.sample.num_sample_steps or 0))
    for score in chain(result.bits, *(sampling.scores for sampling in samplings[-1:])):
        is_ranked = score.n_real is not None and score.name.partition("-")[0] in RANKED
        if score.is_finite and (is_ranked or score.name in RANKED):
            yield score


def _ranking(
    name: str, scored: Mapping[str, tuple[int, Score]], of_image: Mapping[str, Sequence[float]]
) -> Ranking:
    """The ranking of one metric, image by image if the values of all images are known."""
    each = [of_image.get(key, ()) for key in scored]
    is_paired = len(each[0]) > 1 and len({len(values) for values in each}) == 1
    values, errors = zip(*((score.value, score.error) for _, score in scored.values()), strict=True)
    places = paired_ranks(each) if is_paired else ranks(values, errors)
    cells = {
        key: Cell(score.value, score.error, at, rank, score.n_real or score.n, own if is_paired else ())
        for (key, (at, score)), rank, own in zip(scored.items(), places, each, strict=True)
    }
    return Ranking(name, cells, floor=next(score.floor for _, score in scored.values()))


def _in_minutes_if_short(chart: Chart) -> Chart:
    """A chart over hours, with minutes instead if all of it is within an hour."""
    if max(point.x for points in chart.curves.values() for point in points) > 1:
        return chart
    curves = {key: [p._replace(x=60 * p.x) for p in points] for key, points in chart.curves.items()}
    return replace(chart, x_label="minutes of training", curves=curves)


def _over_hours(run: ComparedRun, points: Sequence[Point]) -> list[Point]:
    hours = ((point, run.hours(point.x)) for point in points)
    return [point._replace(x=x) for point, x in hours if x is not None]
