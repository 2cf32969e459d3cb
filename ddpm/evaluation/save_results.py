"""Writes results of an evaluation: to a file, to the folders of the runs, and, from there, to MLflow.

The file and the folders may be in any storage. If MLflow is unreachable, the folders still have all results.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ddpm.runs import run_folder, storage
from ddpm.runs.evaluations import CheckpointResult, Report, nearest_pictures
from ddpm.runs.run_folder import RunFolder
from ddpm.runs.storage import Location
from ddpm.tracking.evaluations import rows_of
from ddpm.tracking.mlflow_client import MlflowError, tracking_uri, without_password
from ddpm.tracking.push import is_in_mlflow
from ddpm.tracking.pusher import push_patiently
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error

MLFLOW_TIMEOUT_S = 20.0
"""A push gives up after this many seconds in which MLflow accepted nothing."""


def output_location(out: str) -> Location:
    """The file `out`, a path or a URI; checked to be writable."""
    location = storage.resolve(out)
    if location.is_local:
        path = Path(location.path)
        if path.is_dir():
            raise UserError(f"--out {out} is a folder; it must name a file")
        nearest = next(parent for parent in path.parents if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"--out {out} cannot be written: {nearest} is not a writable folder")
    return location


def to_file(report: Report, location: Location) -> Iterator[str]:
    """Write the report to `location`, and its pictures beside it; yields lines that name the files."""
    write(location, report.to_json().encode())
    yield f"results     {location.uri}"
    for name, result in nearest_pictures(report, Path(location.path).name):
        write(location.beside(name), result.drawn.nearest)
        yield f"nearest     {location.beside(name).uri}"


def to_runs(report: Report, timeout_s: float = MLFLOW_TIMEOUT_S) -> Iterator[str]:
    """Write each run's results to `evaluations/` in its folder, and push the run to MLflow, if MLflow has it.

    A run that is not tracked is not pushed.

    The names of the files depend on the checkpoints and the settings, so the same evaluation replaces only its own, and
    keeps its time. Yields lines that name the files and the MLflow runs.
    """
    for result in {result.run_key: result for result in report.results}.values():
        yield from _to_run(report.of_run(result.run_key), result, timeout_s)


def _to_run(of_run: Report, result: CheckpointResult, timeout_s: float) -> Iterator[str]:
    """Write the results of one run.

    Args:
        result: one of these results.
    """
    folder = run_folder.folder_of(result.checkpoint, result.run_key)
    if folder is None:
        yield f"MLflow      nothing is logged for {result.checkpoint}, which is not in its run's folder"
        return
    file = folder.child(run_folder.EVALUATIONS).child(f"{of_run.key}.json")
    try:
        for name, pictured in nearest_pictures(of_run, Path(file.path).name):
            write(file.beside(name), pictured.drawn.nearest)
        write(
            file, _dated(of_run, file).to_json().encode()
        )  # last, so that a file of results has its pictures
    except UserError as error:
        yield f"run         {result.run} does not keep its results: {error}"
        return
    yield f"run         {file.uri}"
    if run_folder.read_card(folder).config.get("run", {}).get("tracking") == "none":
        return
    yield _push(RunFolder(Path(folder.path).name, folder, result.run_key), timeout_s)


def _dated(report: Report, file: Location) -> Report:
    """The report with the time at which `file` first had these results: now, or the file's own time."""
    with suppress(OSError, UserError):
        before = Report.from_json(file.read(), file.uri)
        if rows_of([replace(before, time_ms=0)]) == rows_of([report]):
            return replace(report, time_ms=before.time_ms)
    return replace(report, time_ms=int(time.time() * 1000))


def _push(run: RunFolder, timeout_s: float) -> str:
    """Push a run to MLflow, if MLflow has it; returns a line with the outcome."""
    shown = without_password(tracking_uri())
    try:
        if not is_in_mlflow(run):
            command = f"ddpm sync {run.location.uri}"
            return f"MLflow      {shown} does not have run {run.name}; `{command}` sends it"
        pushed = push_patiently(run, timeout_s)
    except MlflowError as error:
        return f"MLflow      {error}"
    except UserError as error:
        return f"MLflow      nothing is logged in {shown}: {error}"
    return f"MLflow      run {pushed.run_id} in {shown}"


def write(file: Location, data: bytes) -> None:
    """Write a file; raise UserError if it cannot be written."""
    with as_user_error(f"cannot write {file.uri}"):
        file.write(data)
