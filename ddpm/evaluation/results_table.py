"""An evaluation's results as a table, and remarks for reading it."""

from collections.abc import Iterator

from ddpm.runs.evaluations import NearerShare, Report, Score, nearest_pictures
from ddpm.utils.progress import printable, shortened
from ddpm.utils.tables import Table, estimate

MAX_RUN = 40
"""Characters of a run's name."""
MANY = 2.0
"""Memorisation is reported if the lower end of its interval is this many times the expected share."""


def table(report: Report) -> Table:
    """A row for each metric, and a column for each checkpoint; real images are last."""
    results = report.results
    names = ["run", *(shortened(printable(result.run), MAX_RUN) for result in results), "real against real"]
    lines = [
        ["images seen", *(f"{result.images_seen:,}" for result in results), ""],
        ["sampler", *(result.drawn.name for result in results), ""],
    ]
    columns = [{score.name: score for score in result.scores} for result in results]
    for name in _names(report):
        cells = [_cell(column[name]) if name in column else "" for column in columns]
        floors = [_floor(column[name]) for column in columns if name in column]
        lines.append([name, *cells, floors[0]])
    return Table(names, lines)


def remarks(report: Report, out: str) -> list[str]:
    """Remarks for reading the scores.

    Args:
        out: the report's file; pictures are beside it.
    """
    lines = [*_on_counts(report), *_on_memorisation(report, out)]
    others = {result.run for result in report.results if not result.saw_this_data}
    if others:
        lines.append(f"trained on data other than the held-out images' data set: {', '.join(sorted(others))}")
    return lines


def _names(report: Report) -> list[str]:
    """The metrics of all results, each once."""
    return list(dict.fromkeys(score.name for result in report.results for score in result.scores))


def _on_counts(report: Report) -> Iterator[str]:
    """The numbers of images behind the scores."""
    metrics: dict[str, dict[str, None]] = {}
    for result in report.results:
        for score in result.scores:
            metrics.setdefault(_counts(score), {})[score.name.partition("-")[0]] = None
    for counts, names in metrics.items():
        yield f"{', '.join(names)}: {counts}"


def _on_memorisation(report: Report, out: str) -> Iterator[str]:
    for uri, result in nearest_pictures(report, out):
        for s in result.drawn.scores:
            if isinstance(s, NearerShare) and s.low > MANY * s.floor and result.saw_this_data:
                yield (
                    f"{result.run}, {result.images_seen:,} images seen, {s.name}: {_percent(s.value)} (95 % interval "
                    f"{_percent(s.low)} to {_percent(s.high)}) of the generated images are nearer to a training image "
                    f"than {100 - 100 * s.floor:.0f} % of held-out images are: the net repeats training images, or "
                    f"makes only typical ones; look at {uri}"
                )


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
