"""Where a report goes: a file, pictures beside it, and the MLflow runs that the checkpoints come from.

Its own room because a report may lie anywhere that storage.py reaches, and MLflow may be away: nothing found is lost
by that.
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
from ddpm.tracking.mlflow_runs import Address, Lost, MlflowRun, tracking_uri, without_password
from ddpm.tracking.retry import OutOfTime
from ddpm.utils.errors import UserError

MLFLOW_TIMEOUT_S = 20.0
"""Seconds without a call that works after which MLflow is left alone."""


def place_for(out: str) -> Location:
    """The file `out`, a path or a URI, once it is sure that one can be written there.

    Raises:
        UserError: it cannot.
    """
    place = locations.resolve(out)
    if place.path.endswith(".png"):
        raise UserError(f"--out {out} is for JSON; the picture goes beside it")
    if place.is_local:
        path = Path(place.path)
        if path.is_dir():
            raise UserError(f"--out {out} is a folder; name a file, as {out.rstrip('/')}/evaluation.json")
        nearest = next(parent for parent in path.parents if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"--out {out} cannot be written: {nearest} is no folder that may be written to")
    return place


def store(report: Report, place: Location, timeout_s: float = MLFLOW_TIMEOUT_S) -> Iterator[str]:
    """Write the report to `place` and its pictures beside it, tell MLflow, and say in lines where everything is.

    Args:
        timeout_s: without a call that works, after which MLflow is left alone.

    Raises:
        UserError: a file cannot be written.
    """
    _write(place, report.to_json().encode())
    yield f"results     {place.uri}"
    picture = plots.picture(report)
    beside = Path(place.path).with_suffix(".png").name
    shown = replace(place, uri=_sibling(place.uri, beside), path=_sibling(place.path, beside))
    _write(shown, picture)
    yield f"picture     {shown.uri}"
    for name, _, drawn in nearest_pictures(report, Path(place.path).name):
        nearest = replace(place, uri=_sibling(place.uri, name), path=_sibling(place.path, name))
        _write(nearest, drawn.nearest)
        yield f"nearest     {nearest.uri}"
    yield from publish(report, picture, timeout_s)


def publish(report: Report, picture: bytes, timeout_s: float = MLFLOW_TIMEOUT_S) -> Iterator[str]:
    """Put results into the MLflow runs of the checkpoints, and say in lines where they went.

    Points are at the step images_seen; one that MLflow has already, at the same step with the same value, is not sent
    again, and one of another value (of more images, say) is sent as a newer point beside it. The report and its
    pictures become artifacts whose name depends on the checkpoints and the settings, so that the same evaluation
    replaces its own files and no other's.
    """
    uri = tracking_uri()
    shown = without_password(uri)
    for verdict in {verdict.run_key: verdict for verdict in report.verdicts}.values():
        if not verdict.run_key:
            yield f"MLflow      nothing is logged of {verdict.checkpoint}, which no run of ours made"
            continue
        run = MlflowRun(Address(uri, verdict.experiment, verdict.run, verdict.run_key), {}, timeout_s)
        try:
            if not run.find():
                yield f"MLflow      {shown} does not know run {verdict.run}; nothing is logged there"
            elif run.add(list(_records(report.of_run(verdict.run_key), picture))):
                yield f"MLflow      run {run.run_id} in {shown}"
            else:
                yield f"MLflow      {shown} did not take everything: {run.call.trouble}"
        except OutOfTime:
            yield f"MLflow      {shown} cannot be reached, nothing is logged: {run.call.trouble}"
            return
        except Lost as error:
            yield f"MLflow      {shown} refuses run {verdict.run}: {error}"


def _records(report: Report, picture: bytes) -> Iterator[Record]:
    now_ms = int(time.time() * 1000)
    for verdict in report.verdicts:
        yield Metrics(metrics(verdict), verdict.images_seen, now_ms)
    yield Artifact(f"evaluation/{report.key}.json", report.to_json().encode())
    yield Artifact(f"evaluation/{report.key}.png", picture)
    for path, _, drawn in nearest_pictures(report, f"evaluation/{report.key}.json"):
        yield Artifact(path, drawn.nearest)


def _write(file: Location, data: bytes) -> None:
    try:
        file.write(data)
    except OSError as error:
        raise UserError(f"cannot write {file.uri}: {error}") from None


def _sibling(path: str, name: str) -> str:
    return f"{path.rpartition('/')[0]}/{name}"
