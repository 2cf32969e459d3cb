"""Publication of a report: a file with pictures beside it, and the folders of the runs, which are pushed to MLflow.

The file may be in any storage. If MLflow is unreachable, the folders still have all results.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ddpm.checkpoints import runs
from ddpm.checkpoints.runs import Run
from ddpm.evaluation import plots
from ddpm.evaluation.results import CheckpointResult, Report, metrics, nearest_pictures
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.tracking.mlflow_client import MlflowError, tracking_uri, without_password
from ddpm.tracking.push import Points, is_in_mlflow
from ddpm.tracking.pusher import push_patiently
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error

MLFLOW_TIMEOUT_S = 20.0
"""Publishing gives up after this many seconds in which MLflow accepted nothing."""


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
    for result in _by_run(report):
        yield from keep(report, result, picture, timeout_s)


def keep(
    report: Report, result: CheckpointResult, picture: bytes, timeout_s: float = MLFLOW_TIMEOUT_S
) -> Iterator[str]:
    """Write the results of the run of `result` to its folder, and push it to MLflow, if MLflow has the run.

    The names of the files depend on the checkpoints and the settings, so the same evaluation replaces only its own, and
    keeps its time.
    """
    folder = runs.folder_of(result.checkpoint, result.run_key)
    if folder is None:
        if not result.run_key:
            yield f"MLflow      nothing is logged for {result.checkpoint}, which belongs to no run"
        else:
            yield f"MLflow      nothing is logged for {result.checkpoint}, which is not in its run's folder"
        return
    of_run = report.of_run(result.run_key)
    file = folder.child(runs.EVALUATIONS).child(f"{of_run.key}.json")
    try:
        for name, data in _pictures(of_run, of_run.key, picture):
            write(file.beside(name), data)
        write(file, _with_points(of_run, file))  # last, so that a file of results has its pictures
    except UserError as error:
        yield f"run         {result.run} does not keep its results: {error}"
        return
    yield f"run         {file.uri}"
    yield _push(Run(Path(folder.path).name, folder, result.run_key), timeout_s)


def _with_points(report: Report, file: Location) -> bytes:
    """The report's JSON with the points that MLflow shows; a report that is in `file` already keeps its time."""
    values = {str(result.images_seen): metrics(result) for result in report.results}
    points = Points(int(time.time() * 1000), values)
    with suppress(OSError, ValueError, KeyError, UserError):
        before = json.loads(file.read())["points"]
        if before["values"] == values:
            points = Points(before["time_ms"], values)
    content = json.loads(report.to_json())
    return (json.dumps({**content, "points": asdict(points)}, indent=2) + "\n").encode()


def _push(run: Run, timeout_s: float) -> str:
    """Push a run to MLflow, if MLflow has it; returns a line with the outcome."""
    shown = without_password(tracking_uri())
    try:
        if not is_in_mlflow(run):
            command = f"python jobs/sync.py {run.location.uri}"
            return f"MLflow      {shown} does not have run {run.name}; `{command}` sends it"
        pushed = push_patiently(run, timeout_s)
    except MlflowError as error:
        return f"MLflow      {error}"
    except UserError as error:
        return f"MLflow      nothing is logged in {shown}: {error}"
    return f"MLflow      run {pushed.run_id} in {shown}"


def _by_run(report: Report) -> Iterable[CheckpointResult]:
    """One result of each run."""
    return {result.run_key: result for result in report.results}.values()


def _pictures(report: Report, stem: str, picture: bytes = b"") -> Iterator[tuple[str, bytes]]:
    """Names and contents of the pictures beside the report's file."""
    if picture:
        yield f"{stem}.png", picture
    for name, _, drawn in nearest_pictures(report, f"{stem}.json"):
        yield name, drawn.nearest


def write(file: Location, data: bytes) -> None:
    """Write a file; raise UserError if it cannot be written."""
    with as_user_error(f"cannot write {file.uri}"):
        file.write(data)
