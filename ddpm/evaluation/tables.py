"""An evaluation's results on a terminal: tables, and remarks for reading them."""

import math
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from ddpm.evaluation.memorisation import METRIC, MIN_HELD_OUT, NearerShare
from ddpm.evaluation.report import CheckpointResult, Report, Row, nearest_pictures, rows
from ddpm.evaluation.scores import MAX_FID_FEATURES, Score
from ddpm.utils.progress import printable

ENOUGH = 10
"""With fewer images per feature than this, FID is mostly bias."""
MANY = 2.0
"""Memorisation is reported if the lower end of its interval is this many times the expected share."""
FIXED = "which favours schedules of many steps, for any net; --variance measured does not"
VARIANCES = {
    "measured": "one per timestep, from the net's errors on training images",
    "learned": "the net's own, pixel by pixel",
    "beta": FIXED,
    "beta_tilde": FIXED,
}
"""Remark about a bound with each variance."""
TERMS = ("bits/dim-prior", "bits/dim-kl", "bits/dim-decoder")


def tables(report: Report, width: int) -> Group:
    """A list of scores for one checkpoint and one way of sampling; else one line for each, real images last.

    Args:
        width: width of the terminal; if the columns do not fit, there are several tables.
    """
    if sum(len(result.drawn) for result in report.results) == 1:
        return Group(_list(report))
    names = [name for name in _by_name(report) if name not in TERMS]
    console, made = Console(width=1000), []
    for at_once in range(len(names), 0, -1):
        made = [_comparison(report, names[i : i + at_once]) for i in range(0, len(names), at_once)]
        if all(console.measure(table).maximum <= width for table in made):
            break
    return Group(*made)


def _comparison(report: Report, names: Sequence[str]) -> Table:
    several = len({result.run for result in report.results}) > 1
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    if several:
        made.add_column("run", no_wrap=True)
    made.add_column("images seen", justify="right", no_wrap=True)
    made.add_column("sampler", "real against real", no_wrap=True)
    for name in names:
        score, title = _by_name(report)[name][0].score, name.replace("-", "-\n", 1)
        made.add_column(f"{title}\nn {_counts(score)}", _floor(score), justify="right", no_wrap=True)
    for result in report.results:
        for i, drawn in enumerate(result.drawn):
            scores = {score.name: score for score in (*(result.bits if i == 0 else ()), *drawn.scores)}
            found = [scores.get(name) for name in names]
            made.add_row(
                *([_name(result) if i == 0 else ""] if several else []),
                f"{result.images_seen:,}" if i == 0 else "",
                drawn.name,
                *(_cell(score) if score else "" for score in found),
            )
    return made


def _list(report: Report) -> Table:
    (result,) = report.results
    (drawn,) = result.drawn
    title = f"{_name(result)}, {result.images_seen:,} images seen, {drawn.name}"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("")
    for title in ("value", "n", "real against real"):
        made.add_column(title, justify="right")
    for score, _, _ in rows(report):
        name = f"  {score.name.partition('-')[2]}" if score.name in TERMS else score.name
        made.add_row(name, _cell(score), _counts(score), _floor(score))
    return made


def remarks(report: Report, out: str) -> list[str]:
    """Remarks for reading the scores.

    Args:
        out: the report's file; pictures are beside it.
    """
    lines = list(_on_variances(report))
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


def _on_variances(report: Report) -> Iterator[str]:
    bounded = [result for result in report.results if result.bits]
    for variance in sorted({result.variance for result in bounded}):
        runs = sorted({result.run for result in bounded if result.variance == variance})
        whose = f" of {', '.join(runs)}" if len({result.variance for result in bounded}) > 1 else ""
        yield f"bits/dim{whose}: the variance is {variance}, {VARIANCES[variance]}"


def _on_memorisation(report: Report, out: str) -> Iterator[str]:
    found = [score for score, _, _ in rows(report) if isinstance(score, NearerShare)]
    if found and (n := found[0].n_real) < MIN_HELD_OUT:
        yield (
            f"{METRIC}: {n} held-out images are too few for a 1st percentile; the smallest of their distances is used "
            f"instead, below which {_percent(found[0].floor)} of other held-out images are expected"
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


def _by_name(report: Report) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows(report):
        groups.setdefault(row.score.name, []).append(row)
    return groups


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cell(score: Score) -> str:
    if isinstance(score, NearerShare):
        return f"{score.value:.4f} [{score.low:.4f}, {score.high:.4f}]"
    return _estimate(score.value, score.error)


def _name(result: CheckpointResult) -> str:
    """The run's name for a table, without Rich's markup or control characters, since it comes from a checkpoint."""
    return escape(printable(result.run))


def _estimate(value: float, error: float) -> str:
    is_tiny = 0 < abs(value) < 5e-5
    return f"{value:.0e} ± {error:.0e}" if is_tiny else f"{value:.4f} ± {error:.4f}"


def _counts(score: Score) -> str:
    return f"{score.n:,}" if score.n_real is None else f"{score.n:,} / {score.n_real:,}"


def _floor(score: Score) -> str:
    """The floor, with its own n if that is smaller."""
    if score.floor is None or score.floor_error is None:
        return ""
    fewer = f" (n {score.floor_n:,})" if score.floor_n != score.n else ""
    return _estimate(score.floor, score.floor_error) + fewer
