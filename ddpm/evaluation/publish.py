"""Publication of a report: a file, pictures beside it, and the MLflow runs of the checkpoints.

The file may be in any storage. If MLflow is unreachable, the file still has all results.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ddpm.evaluation import plots
from ddpm.evaluation.report import Report, metrics, nearest_pictures
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.tracking.metrics_buffer import Artifact, Metrics, Record
from ddpm.tracking.mlflow_client import Lost, tracking_uri
from ddpm.tracking.mlflow_runs import Address, MlflowRun, without_password
from ddpm.tracking.retry import OutOfTime
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error

MLFLOW_TIMEOUT_S = 20.0
"""Seconds without a successful call before publishing to MLflow stops."""


def place_for(out: str, example: str = "evaluation.json") -> Location:
    """The file `out`, a path or a URI; checked to be writable.

    Args:
        example: a file name that error messages suggest.

    Raises:
        UserError: it cannot be written.
    """
    place = locations.resolve(out)
    if place.path.endswith(".png") and example.endswith(".json"):
        raise UserError(
            f"--out {out} names an image, but it must name the JSON file; plots are written next to it"
        )
    if place.is_local:
        path = Path(place.path)
        if path.is_dir():
            raise UserError(f"--out {out} is a folder; name a file, such as {out.rstrip('/')}/{example}")
        nearest = next(parent for parent in path.parents if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"--out {out} cannot be written: {nearest} is not a writable folder")
    return place


def store(report: Report, place: Location, timeout_s: float = MLFLOW_TIMEOUT_S) -> Iterator[str]:
    """Write the report to `place` and its pictures beside it, and log it to MLflow; yields lines that name the places.

    Args:
        timeout_s: seconds without a successful call before publishing to MLflow stops.

    Raises:
        UserError: a file cannot be written.
    """
    write(place, report.to_json().encode())
    yield f"results     {place.uri}"
    picture = plots.picture(report)
    shown = _beside(place, Path(place.path).with_suffix(".png").name)
    write(shown, picture)
    yield f"plot        {shown.uri}"
    for name, _, drawn in nearest_pictures(report, Path(place.path).name):
        nearest = _beside(place, name)
        write(nearest, drawn.nearest)
        yield f"nearest     {nearest.uri}"
    yield from publish(report, picture, timeout_s)


def publish(report: Report, picture: bytes, timeout_s: float = MLFLOW_TIMEOUT_S) -> Iterator[str]:
    """Log results to the MLflow runs of the checkpoints; yields lines that name the places.

    Points are at the step images_seen. A point that is in MLflow with the same step and value is not sent again; a
    different value (from more images, for example) is added as a newer point. The report and its pictures become
    artifacts. Their names depend on the checkpoints and the settings, so the same evaluation replaces only its own
    files.
    """
    uri = tracking_uri()
    shown = without_password(uri)
    for result in {result.run_key: result for result in report.results}.values():
        if not result.run_key:
            yield f"MLflow      nothing is logged for {result.checkpoint}, which belongs to no run"
            continue
        run = MlflowRun(Address(uri, result.experiment, result.run, result.run_key), {}, timeout_s)
        try:
            if not run.find():
                yield f"MLflow      {shown} does not have run {result.run}; nothing is logged there"
            elif run.add(list(_records(report.of_run(result.run_key), picture))):
                yield f"MLflow      run {run.run_id} in {shown}"
            else:
                yield f"MLflow      {shown} did not accept everything: {run.call.trouble}"
        except OutOfTime:
            yield f"MLflow      {shown} cannot be reached, nothing is logged: {run.call.trouble}"
            return
        except Lost as error:
            yield f"MLflow      {shown} refuses run {result.run}: {error}"


def _records(report: Report, picture: bytes) -> Iterator[Record]:
    now_ms = int(time.time() * 1000)
    for result in report.results:
        yield Metrics(metrics(result), result.images_seen, now_ms)
    yield Artifact(f"evaluation/{report.key}.json", report.to_json().encode())
    yield Artifact(f"evaluation/{report.key}.png", picture)
    for path, _, drawn in nearest_pictures(report, f"evaluation/{report.key}.json"):
        yield Artifact(path, drawn.nearest)


def write(file: Location, data: bytes) -> None:
    """Write a file; raise UserError if it cannot be written."""
    with as_user_error(f"cannot write {file.uri}"):
        file.write(data)


def _beside(file: Location, name: str) -> Location:
    uri, path = (f"{where.rpartition('/')[0]}/{name}" for where in (file.uri, file.path))
    return replace(file, uri=uri, path=path)
