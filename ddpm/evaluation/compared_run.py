"""Runs to compare, each read from its folder and from MLflow: settings, curves, grids, evaluations.

A run's folder has its config, grids and trajectory; MLflow has its curves and evaluations, and the run's spool has what
is not in MLflow yet. A run given by its MLflow id is read from MLflow only.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ddpm.checkpoints import checkpoint, runs
from ddpm.checkpoints.runs import Run
from ddpm.config import Config, from_json
from ddpm.evaluation.report import Report, nearest_pictures
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.tracking import metrics_buffer, pages, spool
from ddpm.tracking.metrics_buffer import DamagedSegment, Metrics
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.mlflow_runs import PICTURE_FILE, RUN_KEY_TAG
from ddpm.tracking.run_reader import RecordedRun, RunReader, Unreadable
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable

MLFLOW_TIMEOUT_S = 20.0
RUN_ID = re.compile(r"[0-9a-f]{32}")
RATE = "train/images_per_s"
ERRORS = {"held_out/bits_per_dim": "held_out_error/bits_per_dim"}
"""Metric -> the metric that holds its standard error."""
CURVES = ("train/loss", "held_out/loss", *ERRORS)
GRID = re.compile(r"(\d{12,19})\.png")
GIF = "pictures/reverse_trajectory.gif"

Read = Callable[[], bytes]


@dataclass(frozen=True)
class Point:
    """One point of a curve over images seen."""

    images_seen: int
    value: float
    error: float = 0.0
    """Standard error; 0: unknown."""


@dataclass(frozen=True)
class ComparedRun:
    """The compared data of a run."""

    name: str
    key: str
    """Its run key, or its MLflow id."""
    where: str
    """The folder or MLflow it was read from."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Its flat config, without settings that have no effect."""
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    """Curves by metric, ascending."""
    grids: Mapping[int, Read] = field(default_factory=dict)
    """PNGs of sampled images by images seen, ascending."""
    trajectory: Read | None = None
    """A GIF: noise becoming images."""
    evaluations: Sequence[Report] = ()
    """Results of jobs/evaluate.py; they may include other runs."""
    remarks: Sequence[str] = ()
    """Files that could not be read, and why."""

    @property
    def images_seen(self) -> int:
        """The last position of a curve or a grid."""
        at = [point.images_seen for curve in self.curves.values() for point in curve]
        return max([*at, *self.grids], default=0)

    def hours(self, images_seen: int) -> float | None:
        """Hours of training up to a position, by the logged images/s; None: unknown. Breaks do not count."""
        rates = [point for point in self.curves.get(RATE, ()) if point.value > 0]
        if not rates or images_seen > rates[-1].images_seen:
            return None
        at = np.array([0, *(point.images_seen for point in rates)])
        spent = np.diff(at) / np.array([point.value for point in rates]) / 3600
        return float(np.interp(images_seen, at, [0, *spent.cumsum()]))


def read(uris: Sequence[str], evaluations: Sequence[str] = ()) -> list[ComparedRun]:
    """The runs at `uris`, each once: folders or URIs of runs, or MLflow run ids at MLFLOW_TRACKING_URI.

    Args:
        evaluations: files of jobs/evaluate.py, beside those in MLflow.

    Raises:
        UserError: a URI is not a run, or cannot be read.
    """
    reader, found = RunReader(tracking_uri(), MLFLOW_TIMEOUT_S), dict[str, ComparedRun]()
    reports = [_report_in_file(uri) for uri in evaluations]
    for uri in dict.fromkeys(uris):
        try:
            run = _read(uri, reader)
        except OSError as error:
            raise UserError(f"{uri} cannot be read: {error}") from None
        run = replace(run, name=printable(run.name), evaluations=[*run.evaluations, *reports])
        found.setdefault(run.key, run)
    return list(found.values())


def _read(uri: str, reader: RunReader) -> ComparedRun:
    if RUN_ID.fullmatch(uri) and not locations.resolve(uri).exists():
        recorded = reader.by_id(uri)
        if recorded is None:
            raise UserError(f"{uri} is neither a run's folder nor a run's id in MLflow at {reader.where}")
        return _recorded_run(recorded, reader)
    if not locations.resolve(uri).exists():
        raise UserError(f"{uri} does not exist; expected a run's folder or URI, or a run's id in MLflow")
    return _run_in_folder(runs.existing_run(uri), reader)


def _run_in_folder(run: Run, reader: RunReader) -> ComparedRun:
    place, kept = run.location, runs.checkpoints(run.location)
    if not kept:
        remark = f"{place.uri} has no checkpoint yet, so its settings and its MLflow experiment are unknown"
        return ComparedRun(run.name, run.key, place.uri, grids=_grids_in(place), remarks=[remark])
    card, committed = kept[-1].child("config.json"), int(kept[-1].path.rpartition(checkpoint.PREFIX)[2])
    config = from_json(card.read().decode(errors="replace"), card.uri)
    waiting, remarks = _undelivered(place.child(spool.FOLDER), committed)
    evaluations: list[Report] = []
    try:
        if recorded := reader.by_key(config.run.experiment, run.key):
            waiting = [*_histories(recorded), *waiting]
            evaluations, more = _evaluations(recorded)
            remarks += more
        else:
            remarks.append(
                f"MLflow at {reader.where} does not have this run: its delivered curves are missing"
            )
    except Unreadable as error:
        remarks.append(f"curves and evaluations in MLflow are missing: {error}")
    gif = place.child(GIF)
    return ComparedRun(
        run.name,
        run.key,
        place.uri,
        _settings(config),
        _curves(waiting),
        _grids_in(place),
        gif.read if gif.exists() else None,
        evaluations,
        remarks,
    )


def _recorded_run(run: RecordedRun, reader: RunReader) -> ComparedRun:
    grids = {}
    for path in run.files("images"):
        if (match := PICTURE_FILE.fullmatch(path)) and match[2] == "samples":
            grids[int(match[3])] = partial(run.read, path)
    evaluations, remarks = _evaluations(run)
    settings = run.params
    if "config.json" in run.files():
        config = from_json(run.read("config.json").decode(errors="replace"), "config.json in MLflow")
        settings = _settings(config)
    return ComparedRun(
        run.name,
        run.tags.get(RUN_KEY_TAG, run.run_id),
        f"{run.run_id} in {reader.where}",
        settings,
        _curves(_histories(run)),
        dict(sorted(grids.items())),
        partial(run.read, GIF) if GIF in run.files("pictures") else None,
        evaluations,
        remarks,
    )


def _settings(config: Config) -> dict[str, str]:
    return {key: str(value) for key, value in pages.params(config).items()}


def _grids_in(place: Location) -> dict[int, Read]:
    folder = place.child("samples")
    found = [(match, folder.child(name)) for name in folder.files() if (match := GRID.fullmatch(name))]
    return {int(match[1]): file.read for match, file in found}


def _histories(run: RecordedRun) -> Iterator[Metrics]:
    for name in (*CURVES, *ERRORS.values(), RATE):
        yield from run.history(name)


def _undelivered(folder: Location, committed: int) -> tuple[list[Metrics], list[str]]:
    """Metrics that are not in MLflow yet, and remarks about segments that cannot be read."""
    found, remarks = list[Metrics](), list[str]()
    for file in spool.final(folder, committed):
        try:
            records = metrics_buffer.read(file.read(), file.uri)
        except FileNotFoundError:  # uploaded meanwhile
            continue
        except DamagedSegment as error:
            remarks.append(str(error))
            continue
        found += [record for record in records if isinstance(record, Metrics)]
    return found, remarks


def _curves(records: Iterable[Metrics]) -> dict[str, list[Point]]:
    """Curves from records. At each position the newest value counts; non-finite values are left out."""
    newest: dict[str, dict[int, float]] = {}
    for record in sorted(records, key=lambda record: record.timestamp_ms):
        for name, value in record.values.items():
            if np.isfinite(value):
                newest.setdefault(name, {})[record.images_seen] = value
    return {
        name: [
            Point(at, value, newest.get(ERRORS.get(name, ""), {}).get(at, 0.0))
            for at, value in sorted(newest[name].items())
        ]
        for name in (*CURVES, RATE)
        if name in newest
    }


def _evaluations(run: RecordedRun) -> tuple[list[Report], list[str]]:
    """Results of jobs/evaluate.py among a run's artifacts, and remarks about damaged ones."""
    found, remarks = list[Report](), list[str]()
    paths = run.files("evaluation")
    for path in (path for path in paths if path.endswith(".json")):
        try:
            report = Report.from_json(run.read(path), f"{path} in MLflow")
        except Unreadable:
            raise
        except UserError as error:
            remarks.append(str(error))
            continue
        found.append(_with_pictures(report, path, lambda name: run.read(name) if name in paths else b""))
    return found, remarks


def _report_in_file(uri: str) -> Report:
    """The results of jobs/evaluate.py in a file, with the pictures beside it.

    Raises:
        UserError: the file has no results.
    """
    file = locations.resolve(uri)
    try:
        report = Report.from_json(file.read(), uri)
    except OSError as error:
        raise UserError(f"--evaluations {uri} cannot be read: {error}") from None

    def picture(name: str) -> bytes:
        beside = replace(file, path=f"{file.path.rpartition('/')[0]}/{name}")
        return beside.read() if beside.exists() else b""

    return _with_pictures(report, file.path.rpartition("/")[2], picture)


def _with_pictures(report: Report, out: str, read_picture: Callable[[str], bytes]) -> Report:
    """`report` with its pictures of the nearest training images, as jobs/evaluate.py named them beside `out`."""
    pictures = {id(way): read_picture(name) for name, _, way in nearest_pictures(report, out)}
    results = (
        replace(result, drawn=tuple(replace(way, nearest=pictures.get(id(way), b"")) for way in result.drawn))
        for result in report.results
    )
    return replace(report, results=tuple(results))
