"""Comparison of runs: ranks with ties, and which run is better.

Scores are compared among runs that were evaluated alike: the same held-out images, number of images, feature net and
seed. Training losses are not ranked: losses of different schedules are not comparable.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ddpm.evaluation.compared_run import ERRORS, ComparedRun
from ddpm.evaluation.ranking import Rank, paired_ranks, ranks
from ddpm.evaluation.results import CheckpointResult, Report, Score
from ddpm.utils.errors import UserError

RANKED = ("bits/dim", "KID", "FID")
"""Metrics that are ranked; lower is better."""
ANSWERS = {
    "bits/dim": "held-out bits/dim",
    "held_out/bits_per_dim": "bits/dim of a few held-out images, in training",
}
"""Metrics besides KID that tell which run is better, and their names for people."""
UNLIKE_LABELS = "A net with labels bounds log p(x | y), a net without them log p(x)."
UNLIKE_DATA = "The runs were trained on different data, and each is judged by its own held-out images."

LETTERS = "ABCDEFGHIJKLMNOPQRST"

Results = Mapping[str, Mapping[int, CheckpointResult]]
"""Results of evaluations with the same settings, by run key and images seen."""


class Cell(NamedTuple):
    """A run's score in a ranking."""

    value: float
    error: float
    images_seen: int
    rank: Rank
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
        a = self.cells[first]
        b = self.cells[second]
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


class Step(NamedTuple):
    """What to do next."""

    text: str
    command: str


class Answer(NamedTuple):
    """Which run is better, and what that rests on."""

    letters: Mapping[str, str]
    """A letter for each run, by key."""
    names: Mapping[str, str]
    """Runs by key, as texts call them: "A (digits)"."""
    results: Results
    rankings: Sequence[Ranking]
    verdicts: Sequence[Verdict]
    step: Step | None
    """The command that evaluates the runs; None: they are evaluated, or the rankings were given."""


def answer(runs: Sequence[ComparedRun], rankings: Sequence[Ranking] | None = None) -> Answer:
    """Compare at most 20 runs.

    Args:
        rankings: those of a search; None: computed from the runs' evaluations.
    """
    if len(runs) > len(LETTERS):
        raise UserError(f"{len(runs)} runs are too many for one page; name at most {len(LETTERS)}")
    results = results_alike(runs)
    letters = {run.key: letter for run, letter in zip(runs, LETTERS, strict=False)}
    names = {run.key: f"{letters[run.key]} ({run.name})" for run in runs}
    step = None
    if rankings is None:
        rankings = ranked(runs, results)
        step = next_step(runs, results, names)
    return Answer(
        letters=letters,
        names=names,
        results=results,
        rankings=rankings,
        verdicts=list(verdicts(rankings, names)),
        step=step,
    )


class _Alike(NamedTuple):
    """Results of evaluations with the same settings and the same sampler."""

    num_images: int
    is_own: bool
    """Whether the runs were sampled with their own settings."""
    results: dict[str, dict[int, CheckpointResult]]


def results_alike(runs: Sequence[ComparedRun]) -> Results:
    """The results with the settings and the sampler that most runs share.

    Of equals those with most images count, then those of the runs' own samplers.
    """
    newest = {run.key: run.images_seen for run in runs}
    groups: dict[str, _Alike] = {}
    for report in (report for run in runs for report in run.evaluations):
        for result in report.results:
            of = result.run_key or result.checkpoint  # a built-in net belongs to no run
            if of in newest:
                new = _Alike(report.settings.get("num_images", 0), result.drawn.is_own, {})
                group = groups.setdefault(_evaluation_key(report, result), new)
                group.results.setdefault(of, {})[result.images_seen] = result

    def worth(group: _Alike) -> tuple[int, ...]:
        num_newest = sum(newest[key] in of_run for key, of_run in group.results.items())
        return len(group.results), num_newest, group.num_images, group.is_own

    if not groups:
        return {}
    return max(groups.values(), key=worth).results


def ranked(runs: Sequence[ComparedRun], results: Results) -> list[Ranking]:
    """Ranks by each metric that at least two runs have, each at its newest evaluated checkpoint."""
    scored: dict[str, dict[str, tuple[int, Score]]] = {}
    of_image: dict[str, Sequence[float]] = {}
    for run in runs:
        of_run = results.get(run.key)
        if not of_run:
            continue
        at = max(of_run)
        of_image[run.key] = of_run[at].bits_of_image
        for score in ranked_scores(of_run[at]):
            scored.setdefault(score.name, {})[run.key] = at, score
    if all(len(cells) < 2 for cells in scored.values()):
        scored |= _scored_in_training(runs)
    has_unlike_data = len({run.data for run in runs if run.data}) > 1
    has_unlike_labels = len({run.settings.get("model.num_classes", "0") for run in runs if run.settings}) > 1
    found = []
    for name, cells in scored.items():
        if len(cells) < 2:
            continue
        ranking = _ranking(name, cells, of_image if name == "bits/dim" else {})
        if has_unlike_labels and name in ANSWERS:
            ranking = replace(ranking, note=UNLIKE_LABELS, is_comparable=False)
        if has_unlike_data and name in ERRORS:
            ranking = replace(ranking, note=UNLIKE_DATA, is_comparable=False)
        found.append(ranking)
    return found


def _scored_in_training(runs: Sequence[ComparedRun]) -> dict[str, dict[str, tuple[int, Score]]]:
    """The last values of metrics that were logged during training, with their errors."""
    scored: dict[str, dict[str, tuple[int, Score]]] = {}
    for name in ERRORS:
        scored[name] = {}
        for run in runs:
            points = run.curves.get(name)
            if points and points[-1].error:
                last = points[-1]
                scored[name][run.key] = int(last.x), Score(name, last.value, last.error, 0)
    return scored


def verdicts(rankings: Sequence[Ranking], names: Mapping[str, str]) -> Iterator[Verdict]:
    """Which run is better by bits/dim and by KID.

    Args:
        names: runs by key, as the text calls them.
    """
    for ranking in rankings:
        if not ranking.is_answer or len(ranking.cells) < 2:
            continue
        if not ranking.is_comparable:
            yield Verdict(ranking.name, "Not comparable", ranking.note, False)
            continue
        yield _verdict(ranking, names)


def _verdict(ranking: Ranking, names: Mapping[str, str]) -> Verdict:
    cells = ranking.cells
    order = sorted(cells, key=lambda key: cells[key].value)
    first = order[0]
    second = order[1]
    if ranking.has_winner:
        headline = f"{names[first]} is better than {names[second]}"
        headline += " and all others" if len(order) > 2 else ""
    else:
        tied = [names[key] for key in order if cells[key].rank.best == 1]
        headline = f"No winner: {' and '.join(tied)} are tied" if len(tied) > 1 else "No winner"
    gap, error = ranking.difference(first, second)
    where = "outside" if ranking.has_winner else "inside"
    detail = (
        f"{names[first]} has {cells[first].value:.4f}, {names[second]} has {cells[second].value:.4f}; "
        f"they differ by {gap:.4f} ± {error:.4f}, {where} the errors."
    )
    if len({cell.images_seen for cell in cells.values()}) > 1:
        seen = ", ".join(f"{names[key]} at {cell.images_seen:,}" for key, cell in cells.items())
        detail += f" They were not evaluated at equal images seen: {seen}."
    return Verdict(ranking.name, headline, detail, ranking.has_winner)


def next_step(runs: Sequence[ComparedRun], results: Results, names: Mapping[str, str]) -> Step | None:
    """The command that evaluates the runs alike; None: they are.

    Args:
        names: as in `verdicts`.
    """
    runs = [run for run in runs if run.images_seen]
    late = [run for run in runs if max(results.get(run.key, {}), default=-1) < run.images_seen]
    if not late:
        return None
    who = ", ".join(names[run.key] for run in late)
    return Step(
        f"Not evaluated alike at the newest checkpoint: {who}. Run this, and compare again:",
        shlex.join(["ddpm", "evaluate", *(run.where for run in runs)]),
    )


def lines(found: Answer) -> Iterator[str]:
    """The answer for a terminal."""
    for verdict in found.verdicts:
        yield f"{verdict.metric}: {verdict.headline}. {verdict.detail}"
    if found.verdicts:
        yield "Lower is better; ± is one standard error, without the spread between seeds of training."
    if found.step is not None:
        yield found.step.text
        yield f"    {found.step.command}"


def _evaluation_key(report: Report, result: CheckpointResult) -> str:
    """Everything that the ranked scores depend on, except the checkpoint."""
    settings = {key: value for key, value in report.settings.items() if key != "num_train_images"}
    sampler = "own" if result.drawn.is_own else result.drawn.name
    return json.dumps([settings, sampler], sort_keys=True)


def ranked_scores(result: CheckpointResult) -> Iterator[Score]:
    """Those of the scores that are ranked."""
    for score in result.scores:
        if score.is_finite and score.name.partition("-")[0] in RANKED:
            yield score


def _ranking(
    name: str, scored: Mapping[str, tuple[int, Score]], of_image: Mapping[str, Sequence[float]]
) -> Ranking:
    """The ranking of one metric, image by image if the values of all images are known."""
    each = [of_image.get(key, ()) for key in scored]
    is_paired = len(each[0]) > 1 and len({len(values) for values in each}) == 1
    scores = [score for _, score in scored.values()]
    if is_paired:
        places = paired_ranks(each)
    else:
        places = ranks([score.value for score in scores], [score.error for score in scores])
    cells = {}
    for (key, (at, score)), rank in zip(scored.items(), places, strict=True):
        cells[key] = Cell(
            value=score.value,
            error=score.error,
            images_seen=at,
            rank=rank,
            of_image=of_image[key] if is_paired else (),
        )
    return Ranking(name, cells, floor=scores[0].floor)
