"""The points of a run's evaluations, each in its own file, which MLflow shows as metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from ddpm.runs.curves import CurveRow
from ddpm.runs.storage import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class EvaluationPoints:
    """The points of an evaluation, in its file."""

    time_ms: int
    values: dict[str, dict[str, float]]
    """By images_seen and name."""


@dataclass(frozen=True)
class EvaluationFile:
    """What is read of an evaluation's file."""

    points: EvaluationPoints


def read_points(folder: Location, warn: Callable[[str], object]) -> dict[str, EvaluationPoints]:
    """The points of each evaluation by file name; a damaged file is skipped, with a line to `warn`."""
    found = {}
    for name in folder.files():
        if PurePosixPath(name).suffix != ".json":
            continue
        file = folder.child(name)
        try:
            evaluation = strict_json.parse(
                EvaluationFile, file.read(), f"{file.uri} is damaged", extra="ignore"
            )
        except UserError as error:
            warn(str(error))
            continue
        found[name] = evaluation.points
    return found


def rows_of(evaluations: dict[str, EvaluationPoints]) -> list[CurveRow]:
    """The points as rows of curves; a value that several evaluations have found has the time of the first."""
    times = dict[tuple[str, int, float], int]()
    for points in evaluations.values():
        for images_seen, values in points.values.items():
            for name, value in values.items():
                at = (name, int(images_seen), value)
                times[at] = min(points.time_ms, times.get(at, points.time_ms))
    return [
        CurveRow(name, images_seen, value, time_ms) for (name, images_seen, value), time_ms in times.items()
    ]
