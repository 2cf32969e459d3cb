"""Comparison of runs: ranks with ties, and which run, or which configuration, is better.

Scores are compared among runs that were evaluated alike: the same held-out images, number of images, feature net and
seed. Training losses are not ranked: losses of different schedules are not comparable.

Runs that differ in their seeds alone are one configuration. With MIN_SEEDS runs of each, the verdict is about
configurations, and its error has the spread between seeds; with fewer, it is about the trained nets.
"""

import json
import math
import os.path
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ddpm.evaluation.compared_run import ERRORS, ComparedRun
from ddpm.evaluation.ranking import (
    Rank,
    configuration_difference,
    configuration_ranks,
    paired_ranks,
    ranks,
)
from ddpm.runs.evaluations import CheckpointResult, Report, Score
from ddpm.utils.errors import UserError

RANKED = ("bits/dim", "KID", "FID")
"""Metrics that are ranked; lower is better."""
OF_NETS = (
    "Lower is better; ± is one standard error, without the spread between seeds of training: the verdict is about "
    "these trained nets."
)
OF_CONFIGURATIONS = (
    "Lower is better; ± is one standard error, with the spread between seeds of training: the verdict is about "
    "configurations."
)
IN_TRAINING = "held_out/bits_per_dim"
UNLIKE_LABELS = "A net with labels bounds log p(x | y), a net without them log p(x)."
UNLIKE_DATA = "The runs were trained on different data, and each is judged by its own held-out images."

MIN_SEEDS = 3
"""Trainings of each configuration that a verdict about configurations needs."""

TRAINS = re.compile(r"(ddpm train|(python3? )?\S*\btrain\.py) ")
"""Commands of a shell that train a run."""
REPLACED = ("--name", "--run.name", "--seed", "--train.seed")
"""Flags that the command for another seed has anew."""
LETTERS = "ABCDEFGHIJKLMNOPQRST"

Results = Mapping[str, Mapping[int, CheckpointResult]]
"""Results of evaluations with the same settings, by run key and images seen."""


def is_bound(name: str) -> bool:
    """Whether a metric is a bound in bits/dim, of images or of latents."""
    return name == IN_TRAINING or name.startswith("bits/dim")


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
        if self.title == IN_TRAINING:
            return "bits/dim of a few held-out images, in training"
        return f"held-out {self.title}" if is_bound(self.title) else self.title

    @property
    def is_answer(self) -> bool:
        """Whether this metric tells which run is better."""
        return is_bound(self.title) or self.title.startswith("KID")

    def difference(self, first: str, second: str) -> tuple[float, float]:
        """The second run's value minus the first one's, and the standard error: image by image, where possible."""
        a = self.cells[first]
        b = self.cells[second]
        error = math.hypot(a.error, b.error)
        if a.of_image:
            each = np.subtract(b.of_image, a.of_image)
            error = float(each.std(ddof=1) / len(each) ** 0.5)
        return b.value - a.value, error


class Configuration(NamedTuple):
    """Runs that differ in their seeds alone."""

    name: str
    """As texts call it: "cosine (A, B, C)"; of a single run, the run's."""
    runs: Sequence[ComparedRun]


class Verdict(NamedTuple):
    """Which run, or which configuration, is better by one metric."""

    metric: str
    headline: str
    detail: str
    has_winner: bool
    is_of_configurations: bool = False


class SuggestedCommand(NamedTuple):
    """What to do next."""

    text: str
    command: str
    """One or several lines."""


class Comparison(NamedTuple):
    """Which run is better, and what that rests on."""

    letters: Mapping[str, str]
    """A letter for each run, by key."""
    names: Mapping[str, str]
    """Runs by key, as texts call them: "A (digits)"."""
    results: Results
    rankings: Sequence[Ranking]
    verdicts: Sequence[Verdict]
    remark: str
    """What the errors of the verdicts include; empty: there is no verdict."""
    steps: Sequence[SuggestedCommand]
    """Those that evaluate the runs, and that train more seeds; empty if the rankings were given."""


def compare(runs: Sequence[ComparedRun], rankings: Sequence[Ranking] | None = None) -> Comparison:
    """Compare at most 20 runs.

    Args:
        rankings: those of a search; None: computed from the runs' evaluations.
    """
    if len(runs) > len(LETTERS):
        raise UserError(f"{len(runs)} runs are too many for one page; name at most {len(LETTERS)}")
    results = results_alike(runs)
    letters = {run.key: letter for run, letter in zip(runs, LETTERS, strict=False)}
    names = {run.key: f"{letters[run.key]} ({run.name})" for run in runs}
    found = configurations(runs, letters)
    steps = list[SuggestedCommand]()
    if rankings is None:
        rankings = ranked(runs, results)
        stated = list(verdicts(rankings, names, found))
        steps += evaluation_step(runs, results, names)
        steps += more_seeds(found, runs)
    else:  # of a search, which compares configurations itself
        stated = list(verdicts(rankings, names))
    remark = ""
    if stated:
        is_of_configurations = all(verdict.is_of_configurations for verdict in stated)
        remark = OF_CONFIGURATIONS if is_of_configurations else OF_NETS
    return Comparison(
        letters=letters,
        names=names,
        results=results,
        rankings=rankings,
        verdicts=stated,
        remark=remark,
        steps=steps,
    )


def configurations(runs: Sequence[ComparedRun], letters: Mapping[str, str]) -> list[Configuration]:
    """The runs by configuration, in their order. A run whose configuration is unknown is alone."""
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        groups.setdefault(run.configuration or run.key, []).append(run)
    found = []
    for group in groups.values():
        if len(group) == 1:
            (run,) = group
            name = f"{letters[run.key]} ({run.name})"
        else:
            common = _beginning([run.name for run in group]).rstrip("-_.0123456789")
            name = f"{common or group[0].name} ({', '.join(letters[run.key] for run in group)})"
        found.append(Configuration(name, group))
    return found


def _beginning(names: Sequence[str]) -> str:
    """The characters with which all names begin."""
    first = min(names)
    last = max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


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
        ranking = _ranking(name, cells, of_image if is_bound(name) else {})
        if has_unlike_labels and is_bound(name):
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


def verdicts(
    rankings: Sequence[Ranking], names: Mapping[str, str], configurations: Sequence[Configuration] = ()
) -> Iterator[Verdict]:
    """Which run is better by bits/dim and by KID, or which configuration, if there are enough runs of each.

    Args:
        names: runs by key, as the text calls them.
        configurations: of the runs; empty: the verdicts are about runs.
    """
    for ranking in rankings:
        if not ranking.is_answer or len(ranking.cells) < 2:
            continue
        if not ranking.is_comparable:
            yield Verdict(ranking.name, "Not comparable", ranking.note, False)
        elif _are_ranked(configurations, ranking):
            yield _of_configurations(ranking, configurations)
        else:
            yield _of_runs(ranking, names)


def _are_ranked(configurations: Sequence[Configuration], ranking: Ranking) -> bool:
    """Whether enough runs of each configuration have a value, all at equal images seen."""
    scored = [[run for run in each.runs if run.key in ranking.cells] for each in configurations]
    has_seeds = all(len({run.seed for run in runs}) >= MIN_SEEDS for runs in scored)
    return bool(scored) and has_seeds and len({cell.images_seen for cell in ranking.cells.values()}) == 1


def _of_runs(ranking: Ranking, names: Mapping[str, str]) -> Verdict:
    """Which of the trained nets is better."""
    cells = ranking.cells
    competitors = [_Competitor(names[key], cell.value, cell.rank) for key, cell in cells.items()]
    keys = sorted(cells, key=lambda key: cells[key].value)
    verdict = _verdict(ranking.name, competitors, ranking.difference(keys[0], keys[1]))
    if len({cell.images_seen for cell in cells.values()}) > 1:
        seen = ", ".join(f"{names[key]} at {cell.images_seen:,}" for key, cell in cells.items())
        detail = f"{verdict.detail} They were not evaluated at equal images seen: {seen}."
        verdict = verdict._replace(detail=detail)
    return verdict


def _of_configurations(ranking: Ranking, configurations: Sequence[Configuration]) -> Verdict:
    """Which configuration is better, by the values of all of its trainings."""
    values = []
    for configuration in configurations:
        cells = [ranking.cells[run.key] for run in configuration.runs if run.key in ranking.cells]
        # [K, M]: image by image where that is known
        values.append(np.array([cell.of_image or [cell.value] for cell in cells]))
    spread = np.sqrt(np.mean([each.mean(1).var(ddof=1) for each in values]))
    deviation = f"between seeds their standard deviation is {spread:.4f}"
    if len(values) == 1:
        (only,) = configurations
        headline = f"One configuration: {only.name} differ in their seeds alone"
        detail = f"The mean of {len(values[0])} trainings is {values[0].mean():.4f}; {deviation}."
        return Verdict(ranking.name, headline, detail, False, is_of_configurations=True)
    competitors = [
        _Competitor(configuration.name, float(each.mean()), rank, f" on average of {len(each)} trainings")
        for configuration, each, rank in zip(configurations, values, configuration_ranks(values), strict=True)
    ]
    first, second, *_ = sorted(values, key=np.mean)
    gap, error, _ = configuration_difference(second, first)
    verdict = _verdict(ranking.name, competitors, (gap, error))
    detail = f"{verdict.detail[:-1]}; {deviation}."
    return verdict._replace(detail=detail, is_of_configurations=True)


class _Competitor(NamedTuple):
    """A run or a configuration, and its place."""

    name: str
    value: float
    rank: Rank
    about: str = ""
    """What the value is of."""


def _verdict(metric: str, competitors: Sequence[_Competitor], difference: tuple[float, float]) -> Verdict:
    """The best competitor, if it is significantly better than each other one.

    Args:
        difference: of the best two, and its standard error.
    """
    first, second, *others = sorted(competitors, key=lambda competitor: competitor.value)
    has_winner = first.rank == Rank(1, 1)
    tied = [each.name for each in (first, second, *others) if each.rank.best == 1]
    if has_winner:
        headline = f"{first.name} is better than {second.name}"
        headline += " and all others" if others else ""
    else:
        headline = f"No winner: {' and '.join(tied)} are tied" if len(tied) > 1 else "No winner"
    gap, error = difference
    where = "outside" if has_winner else "inside"
    detail = (
        f"{first.name} has {first.value:.4f}{first.about}, {second.name} has {second.value:.4f}{second.about}; "
        f"they differ by {gap:.4f} ± {error:.4f}, {where} the errors."
    )
    return Verdict(metric, headline, detail, has_winner)


def evaluation_step(
    runs: Sequence[ComparedRun], results: Results, names: Mapping[str, str]
) -> Iterator[SuggestedCommand]:
    """The command that evaluates the runs alike; none if they are.

    Args:
        names: as in `verdicts`.
    """
    runs = [run for run in runs if run.images_seen]
    late = [run for run in runs if max(results.get(run.key, {}), default=-1) < run.images_seen]
    if late:
        who = ", ".join(names[run.key] for run in late)
        yield SuggestedCommand(
            f"Not evaluated alike at the newest checkpoint: {who}. Run this, and compare again:",
            shlex.join(["ddpm", "evaluate", *(run.where for run in runs)]),
        )


def more_seeds(
    configurations: Sequence[Configuration], runs: Sequence[ComparedRun]
) -> Iterator[SuggestedCommand]:
    """The commands that train and evaluate as many seeds as a verdict about configurations needs; none if enough are.

    Runs whose command is not known, such as built-in nets, get none.
    """
    commands = list[str]()
    folders = list[str]()
    for configuration in configurations:
        seeds = {run.seed for run in configuration.runs}
        newest = configuration.runs[-1]
        if len(configurations) < 2 or not newest.configuration or not TRAINS.match(newest.command):
            return
        for seed in range(max(seeds) + 1, max(seeds) + 1 + MIN_SEEDS - len(seeds)):
            name = f"{newest.name}-seed-{seed}"
            commands.append(with_seed(newest.command, seed, name))
            folders.append(f"{os.path.dirname(newest.where)}/{name}")
    if not commands:
        return
    commands.append(shlex.join(["ddpm", "evaluate", *(run.where for run in runs), *folders]))
    yield SuggestedCommand(
        f"Another seed gives another net. With {MIN_SEEDS} seeds of each configuration the verdict is about "
        "configurations. Run this, and compare them all:",
        "\n".join(commands),
    )


def with_seed(command: str, seed: int, name: str) -> str:
    """The command that trains a run with another seed, under another name."""
    words = list[str]()
    is_value = False
    for word in shlex.split(command):
        flag, equals, _ = word.partition("=")
        if flag in REPLACED:
            is_value = not equals
        elif is_value:
            is_value = False
        else:
            words.append(word)
    return shlex.join([*words, "--name", name, "--seed", str(seed)])


def lines(found: Comparison) -> Iterator[str]:
    """The comparison for a terminal."""
    for verdict in found.verdicts:
        yield f"{verdict.metric}: {verdict.headline}. {verdict.detail}"
    if found.remark:
        yield found.remark
    for step in found.steps:
        yield step.text
        yield from (f"    {line}" for line in step.command.splitlines())


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
