"""Publication of a report: a file with pictures beside it, the runs' folders, and the MLflow runs of the checkpoints.

The file may be in any storage. If MLflow is unreachable, the files still have all results.
"""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ddpm.checkpoints import runs
from ddpm.evaluation import plots
from ddpm.evaluation.report import CheckpointResult, Report, metrics, nearest_pictures
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.tracking.metrics_buffer import Artifact, Metrics, Record
from ddpm.tracking.mlflow_client import Lost, tracking_uri, without_password
from ddpm.tracking.mlflow_runs import Address, MlflowRun
from ddpm.tracking.retry import OutOfTime
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error

MLFLOW_TIMEOUT_S = 20.0
"""Seconds without a successful call before publishing to MLflow stops."""


def location_for(out: str, example: str = "evaluation.json") -> Location:
    """The file `out`, a path or a URI; checked to be writable.

    Args:
        example: a file name that error messages suggest.
    """
    location = locations.resolve(out)
    if location.path.endswith(".png") and example.endswith(".json"):
        raise UserError(
            f"--out {out} names an image, but it must name the JSON file; plots are written next to it"
        )
    if location.is_local:
        path = Path(location.path)
        if path.is_dir():
            raise UserError(f"--out {out} is a folder; name a file, such as {out.rstrip('/')}/{example}")
        nearest = next(parent for parent in path.parents if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"--out {out} cannot be written: {nearest} is not a writable folder")
    return location


def store(report: Report, location: Location, timeout_s: float = MLFLOW_TIMEOUT_S) -> Iterator[str]:
    """Write the report to `location` with pictures, to its runs and to MLflow; yields lines that name the locations."""
    write(location, report.to_json().encode())
    yield f"results     {location.uri}"
    picture = plots.picture(report)
    for name, data in _pictures(report, Path(location.path).stem, picture):
        write(location.beside(name), data)
        yield f"{'plot' if data is picture else 'nearest':<12}{location.beside(name).uri}"
    yield from keep(report)
    yield from publish(report, picture, timeout_s)


def keep(report: Report) -> Iterator[str]:
    """Write the results of each run to its own folder, where jobs/compare.py reads them; yields lines that say so."""
    for result in _by_run(report):
        folder = runs.folder_of(result.checkpoint, result.run_key)
        if folder is None:
            continue
        of_run = report.of_run(result.run_key)
        file = folder.child(runs.EVALUATIONS).child(f"{of_run.key}.json")
        try:
            for name, data in _pictures(of_run, of_run.key):
                write(file.beside(name), data)
            write(file, of_run.to_json().encode())  # last, so that a file of results has its pictures
        except UserError as error:
            yield f"run         {result.run} does not keep its results: {error}"
        else:
            yield f"run         {file.uri}"


def publish(report: Report, picture: bytes, timeout_s: float = MLFLOW_TIMEOUT_S) -> Iterator[str]:
    """Log results to the MLflow runs of the checkpoints; yields lines that name the locations.

    Points are at the step images_seen. A point that is in MLflow with the same step and value is not sent again; a
    different value (from more images, for example) is added as a newer point. The report and its pictures become
    artifacts. Their names depend on the checkpoints and the settings, so the same evaluation replaces only its own
    files.
    """
    uri = tracking_uri()
    shown = without_password(uri)
    for result in _by_run(report):
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
                yield f"MLflow      {shown} did not accept everything: {run.call.last_error}"
        except OutOfTime as error:
            yield f"MLflow      {shown} cannot be reached, nothing is logged: {error}"
            return
        except Lost as error:
            yield f"MLflow      {shown} refuses run {result.run}: {error}"


def _by_run(report: Report) -> Iterable[CheckpointResult]:
    """One result of each run."""
    return {result.run_key: result for result in report.results}.values()


def _pictures(report: Report, stem: str, picture: bytes = b"") -> Iterator[tuple[str, bytes]]:
    """Names and contents of the pictures beside the report's file."""
    if picture:
        yield f"{stem}.png", picture
    for name, _, drawn in nearest_pictures(report, f"{stem}.json"):
        yield name, drawn.nearest


def _records(report: Report, picture: bytes) -> Iterator[Record]:
    now_ms = int(time.time() * 1000)
    for result in report.results:
        yield Metrics(metrics(result), result.images_seen, now_ms)
    yield Artifact(f"evaluation/{report.key}.json", report.to_json().encode())
    for name, data in _pictures(report, report.key, picture):
        yield Artifact(f"evaluation/{name}", data)


def write(file: Location, data: bytes) -> None:
    """Write a file; raise UserError if it cannot be written."""
    with as_user_error(f"cannot write {file.uri}"):
        file.write(data)
