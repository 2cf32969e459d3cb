"""Results of ddpm evaluate as points of MLflow's curves."""

import math
from collections.abc import Iterable

from ddpm.runs.curves import CurveRow
from ddpm.runs.evaluations import CheckpointResult, NearerShare, Report


def rows_of(reports: Iterable[Report]) -> list[CurveRow]:
    """The results as rows of curves; a value that several reports have found has the time of the first."""
    times = dict[tuple[str, int, float], int]()
    for report in reports:
        for result in report.results:
            for name, value in curve_values(result).items():
                at = (name, result.images_seen, value)
                times[at] = min(report.time_ms, times.get(at, report.time_ms))
    return [
        CurveRow(name, images_seen, value, time_ms) for (name, images_seen, value), time_ms in times.items()
    ]


def curve_values(result: CheckpointResult) -> dict[str, float]:
    """Values at this checkpoint of MLflow's curves over images seen: eval/bits_per_dim, eval/KID-lite0, ...

    MLflow groups metrics by the first part of their name: errors are eval_error/KID-lite0, ..., values of real images
    against real ones eval_floor/KID-lite0, ..., intervals eval_low/..., eval_high/.... A sampling configuration
    other than the run's own is part of the name: eval/dpmpp_2m-20/KID-lite0.
    """
    values: dict[str, float] = {}
    for score in result.scores:
        if score is result.bits:
            name = "bits_per_dim"
        elif result.drawn.is_own:
            name = score.name
        else:
            name = f"{result.drawn.name}/{score.name}"
        values[f"eval/{name}"] = score.value
        values[f"eval_error/{name}"] = score.error
        if isinstance(score, NearerShare):
            values[f"eval_low/{name}"] = score.low
            values[f"eval_high/{name}"] = score.high
        if score.floor is not None:
            values[f"eval_floor/{name}"] = score.floor
    return {name: value for name, value in values.items() if math.isfinite(value)}
