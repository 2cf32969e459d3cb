"""An evaluation's results as a table, and remarks for reading it."""

import math
from collections.abc import Iterator

from ddpm.evaluation.bits_per_dim import BOUND_TERMS
from ddpm.evaluation.feature_scores import MAX_FID_FEATURES
from ddpm.evaluation.memorisation import METRIC, MIN_HELD_OUT
from ddpm.evaluation.results import NearerShare, Report, Score, ScoreRow, nearest_pictures, rows
from ddpm.utils.progress import printable, shortened
from ddpm.utils.tables import Table, estimate

ENOUGH = 10
"""With fewer images per feature than this, FID is mostly bias."""
FEW = 100
"""With fewer held-out images than this, a remark says that they are few."""
MAX_RUN = 40
"""Characters of a run's name."""
MANY = 2.0
"""Memorisation is reported if the lower end of its interval is this many times the expected share."""
FIXED = "which favours schedules of many steps, for any net; --variance measured does so less"
VARIANCES = {
    "measured": "one per timestep, from the net's errors on training images",
    "learned": "the net's own, pixel by pixel",
    "beta": FIXED,
    "beta_tilde": FIXED,
}
"""Remark about a bound with each variance."""


def table(report: Report) -> Table:
    """A row for each metric, and a column for each checkpoint and sampling configuration; real images are last."""
    columns = [(result, drawn) for result in report.results for drawn in result.drawn]
    names = [
        "run",
        *(shortened(printable(result.run), MAX_RUN) for result, _ in columns),
        "real against real",
    ]
    lines = [
        ["images seen", *(f"{result.images_seen:,}" for result, _ in columns), ""],
        ["sampler", *(drawn.sampler for _, drawn in columns), ""],
    ]
    for setting in dict.fromkeys(setting for _, drawn in columns for setting in drawn.settings):
        lines.append([f"  {setting}", *(drawn.settings.get(setting, "") for _, drawn in columns), ""])
    for name, group in _by_name(report).items():
        cells = []
        for result, drawn in columns:
            scores = {score.name: score for score in (*result.bits, *drawn.scores)}
            cells.append(_cell(scores[name]) if name in scores else "")
        title = f"  {name.partition('-')[2]}" if name in BOUND_TERMS else name
        lines.append([title, *cells, _floor(group[0].score)])
    return Table(names, lines)


def remarks(report: Report, out: str) -> list[str]:
    """Remarks for reading the scores.

    Args:
        out: the report's file; pictures are beside it.
    """
    lines = [*_on_counts(report), *_on_variances(report)]
    size = report.settings["features"]["size"]
    for name, group in _by_name(report).items():
        least = min(min(row.score.n, row.score.n_real or row.score.n) for row in group)
        features = min(size, MAX_FID_FEATURES) if name.startswith("FID-") else size
        if name.startswith("FID") and least < ENOUGH * features:
            lines.append(
                f"{name}: {least:,} images are few for {features:,} features, which raises it by about the value of "
                "real images against real ones; compare with that value, or use KID, which is unbiased"
            )
    lines += _on_memorisation(report, out)
    others = {result.run for result in report.results if not result.saw_this_data}
    if others:
        lines.append(f"trained on data other than the held-out images' data set: {', '.join(sorted(others))}")
    return lines + _remarks_on_bits(report)


def _remarks_on_bits(report: Report) -> list[str]:
    """Reasons why bits/dim of these checkpoints, or of other data, are not comparable."""
    evaluated = [result for result in report.results if result.bits]
    if not evaluated:
        return []
    lines = []
    conditional = {result.run for result in evaluated if result.num_classes}
    if conditional and not all(result.num_classes for result in evaluated):
        # p(x) >= p(x | y) p(y), with p(y) = 1 / num_classes.
        classes = max(result.num_classes for result in evaluated)
        lines.append(
            f"bits/dim: nets with labels ({', '.join(sorted(conditional))}) bound log p(x | y), the others log p(x); "
            f"add log2({classes}) = {math.log2(classes):.2f} bits per image to bound log p(x) with labels, too"
        )
    levels = report.settings["data"]["grey_levels"]
    if levels < 256:
        lines.append(
            f"bits/dim: the held-out images have {levels} grey levels, not 256; a uniform code for these costs "
            f"log2({levels}) = {math.log2(levels):.2f}; do not compare with bits/dim of other data"
        )
    return lines


def _on_counts(report: Report) -> Iterator[str]:
    """The numbers of images behind the scores."""
    metrics: dict[str, dict[str, None]] = {}
    for score, _, _ in rows(report):
        metrics.setdefault(_counts(score), {})[score.name.partition("-")[0]] = None
    for counts, names in metrics.items():
        yield f"{', '.join(names)}: {counts}"
    for count in sorted(
        {score.floor_n for score, _, _ in rows(report) if score.floor_n not in (None, score.n)}
    ):
        yield f"real against real: {count:,} training and the held-out images"
    fewest = min((score.n_real or score.n for score, _, _ in rows(report)), default=FEW)
    if fewest < FEW:
        yield (
            f"{fewest} held-out images are few: the errors (±, one standard error) are large, and a difference within "
            "two of them says nothing; more images make them smaller"
        )


def _on_variances(report: Report) -> Iterator[str]:
    bounded = [result for result in report.results if result.bits]
    for variance in sorted({result.variance for result in bounded}):
        runs = sorted({result.run for result in bounded if result.variance == variance})
        whose = f" of {', '.join(runs)}" if len({result.variance for result in bounded}) > 1 else ""
        yield f"bits/dim{whose}: the variance is {variance}, {VARIANCES[variance]}"


def _on_memorisation(report: Report, out: str) -> Iterator[str]:
    shares = [score for score, _, _ in rows(report) if isinstance(score, NearerShare)]
    if shares and shares[0].n_real < MIN_HELD_OUT:
        yield (
            f"{METRIC}: {shares[0].n_real} held-out images are too few for a 1st percentile; the smallest of their "
            f"distances is used instead, below which {_percent(shares[0].floor)} of other held-out images are expected"
        )
    for uri, result, drawn in nearest_pictures(report, out):
        for s in drawn.scores:
            if isinstance(s, NearerShare) and s.low > MANY * s.floor and result.saw_this_data:
                yield (
                    f"{result.run}, {result.images_seen:,} images seen, {drawn.name}: {_percent(s.value)} (95 % "
                    f"interval {_percent(s.low)} to {_percent(s.high)}) of the generated images are nearer to a "
                    f"training image, by {s.space}, than {100 - 100 * s.floor:.0f} % of held-out images are: the net "
                    f"repeats training images, or makes only typical ones; look at {uri}"
                )


def _by_name(report: Report) -> dict[str, list[ScoreRow]]:
    groups: dict[str, list[ScoreRow]] = {}
    for row in rows(report):
        groups.setdefault(row.score.name, []).append(row)
    return groups


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cell(score: Score) -> str:
    if isinstance(score, NearerShare):
        return f"{score.value:.4f} [{score.low:.4f}, {score.high:.4f}]"
    return estimate(score.value, score.error)


def _counts(score: Score) -> str:
    if score.n_real is None:
        return f"{score.n:,} held-out images"
    return f"{score.n:,} generated and {score.n_real:,} held-out images"


def _floor(score: Score) -> str:
    if score.floor is None or score.floor_error is None:
        return ""
    return estimate(score.floor, score.floor_error)
