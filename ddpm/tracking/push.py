"""MLflow as a mirror of a run's folder: `push` sends what the folder has and MLflow lacks.

It can be repeated at any time, by anybody, against any server, with the same result: MLflow holds a metric with the
same name, step, time and value once, and a file is replaced by the same file. How far MLflow is stands in a tag there,
set after it has accepted a part, so that a push costs little; a server that has lost the run gets everything.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from annotated_types import Ge

from ddpm.config.json import from_json, to_json
from ddpm.config.tree import Config
from ddpm.runs import curves, run_folder
from ddpm.runs.evaluations import read_reports
from ddpm.runs.run_folder import Card, RunFolder, RunStatus, Status
from ddpm.tracking import evaluations, mlflow_client, mlflow_pages, mlflow_run, run_params
from ddpm.tracking.mlflow_client import Connection
from ddpm.tracking.mlflow_run import METRICS_PER_CALL, PARENT_TAG, DeletedRun
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.images import time_ms_of
from ddpm.utils.retry import as_user_error

log = logging.getLogger(__name__)

RESUMED = "resumed."
"""Prefix of tags with the settings of a resumed run that differ from its params, which never change in MLflow."""


SENT_TAG = "ddpm.sent"
"""Tag with JSON that says what MLflow has of a run."""


@dataclass(frozen=True)
class Series:
    """Pictures that MLflow has: how many, and the largest images_seen."""

    num: int = 0
    until: int = -1


@dataclass(frozen=True)
class Sent:
    """What MLflow has of a run, the content of SENT_TAG."""

    points: Annotated[int, Ge(0)] = 0
    """Rows of curves.py."""
    samples: Series = Series()
    denoising: Series = Series()
    about: str = ""
    """Hash of params and tags."""
    pictures: str = ""
    """Hash of the names in this folder."""
    evaluations: str = ""
    """Hash of the names in this folder, and of the times of the evaluations."""


@dataclass(frozen=True)
class Pushed:
    """The run in MLflow after a push."""

    uri: str
    """Without a password."""
    experiment_id: str
    run_id: str
    num_points: int
    """Points that this push sent."""


def push(
    run: RunFolder,
    *,
    accepted: Callable[[], object] = lambda: None,
    warn: Callable[[str], object] = log.warning,
) -> Pushed:
    """Send what a run's folder has to MLflow at MLFLOW_TRACKING_URI, where the run is created if there is none.

    Args:
        accepted: called after each call that MLflow answered.
        warn: called with a line for what MLflow refuses, or what is damaged in the folder; both are skipped.

    Raises:
        MlflowError: MLflow does not answer, or refuses the run.
        UserError: the folder cannot be read, or the run has no configuration yet.
    """
    with as_user_error(f"{run.location.uri} cannot be read"):
        return _Push(run, warn).push(accepted)


def is_in_mlflow(run: RunFolder) -> bool:
    """Whether MLflow has a run; nothing is created there. It raises what `push` raises."""
    database = mlflow_client.database_file(mlflow_client.tracking_uri())
    if database is not None and not database.exists():
        return False
    with as_user_error(f"{run.location.uri} cannot be read"):
        experiment = _Push(run, log.warning).experiment
    return mlflow_run.find(Connection(mlflow_client.tracking_uri()), experiment, run.key) is not None


class _Push:
    """One push of a run."""

    def __init__(self, run: RunFolder, warn: Callable[[str], object]) -> None:
        self._run = run
        self._location = run.location
        self._warn = warn
        self._card = run_folder.read_card(run.location)
        self._status = self._read_status()
        stored = run_folder.checkpoints(run.location)
        self._newest = stored[-1] if stored else None
        self._began, self._now = self._configs()
        self.experiment = self._now.run.experiment

    def push(self, accepted: Callable[[], object]) -> Pushed:
        uri = mlflow_client.tracking_uri()
        mlflow = Connection(uri, accepted)
        self._mlflow = mlflow_run.open_run(
            mlflow,
            self.experiment,
            self._run.key,
            self._run.name,
            began_ms=self._card.created_ms or None,
            warn=self._warn,
        )
        self._sent = _sent(self._mlflow.tags.get(SENT_TAG))
        points_before = self._sent.points
        self._push_about(mlflow)
        self._push_points()
        self._push_series(run_folder.SAMPLES)
        self._push_series(run_folder.DENOISING)
        self._push_pictures()
        self._push_evaluations()
        if self._status is not None:
            self._mlflow.set_status(self._status.status, self._status.ended_ms)
        self._describe()
        return Pushed(
            uri=mlflow_client.without_password(uri),
            experiment_id=self._mlflow.experiment_id,
            run_id=self._mlflow.run_id,
            num_points=self._sent.points - points_before,
        )

    def _read_status(self) -> Status | None:
        try:
            return run_folder.read_status(self._location)
        except UserError as error:  # damaged: the run's next start writes it again
            self._warn(str(error))
            return None

    def _configs(self) -> tuple[Config, Config]:
        """The configuration that the run began with, and that of its newest checkpoint."""
        began = self._card.config
        now = None
        if self._newest is not None:
            file = self._newest.child("config.json")
            now = from_json(file.read(), file.uri)
        if began:
            first = from_json(json.dumps(began), self._location.child(run_folder.CARD).uri)
            return first, now or first
        if now is None:
            raise UserError(f"{self._location.uri} has no checkpoint yet, so nothing is known of the run")
        return now, now  # the run was opened without a configuration

    def _mark(self, **parts: Any) -> None:
        """Store in MLflow what it has now."""
        self._sent = replace(self._sent, **parts)
        self._mlflow.set_tags({SENT_TAG: json.dumps(asdict(self._sent))})

    def _push_about(self, mlflow: Connection) -> None:
        """Params, tags, data set, and the configuration as a file, for --config."""
        params = run_params.params(self._began)
        now = run_params.params(self._now)
        tags = _tags(self._card, self._status, self._began)
        if self._newest is not None:
            tags["checkpoint"] = self._newest.uri
        if self._card.search is not None:
            with suppress(DeletedRun):  # of the search, which does not stop its trials
                parent = mlflow_run.find(mlflow, self.experiment, self._card.search.key)
                if parent is not None:
                    tags[PARENT_TAG] = parent.info.run_id
        about = _digest(params, now, tags)
        if about == self._sent.about:
            return
        self._mlflow.log_params(params)
        for name, value in now.items():
            if str(value) != self._mlflow.params.get(name):
                tags[RESUMED + name] = str(value)
        for name in list(self._mlflow.tags):
            if name.startswith(RESUMED) and name not in tags:
                self._mlflow.delete_tag(name)
        self._mlflow.set_tags(tags)
        if self._card.data is not None:
            self._mlflow.log_data(self._card.data)
        self._mlflow.log_file("config.json", to_json(self._now).encode())
        self._mark(about=about)

    def _push_points(self) -> None:
        end = curves.num_rows(self._location)  # first: training may record more rows meanwhile
        table = curves.read_rows(self._location, self._sent.points, self._warn)
        for start in range(0, table.num_rows, METRICS_PER_CALL):
            rows = curves.to_rows(table.slice(start, METRICS_PER_CALL))
            self._mlflow.log_metrics(rows)
            self._mark(points=self._sent.points + len(rows))
        if self._sent.points < end:  # damaged parts
            self._mark(points=end)

    def _push_series(self, series: str) -> None:
        """Pictures of a series, each at its step."""
        pictures = run_folder.pictures(self._location, series)
        before: Series = getattr(self._sent, series)
        if before.num != sum(images_seen <= before.until for images_seen in pictures):
            before = Series()
        new = {images_seen: file for images_seen, file in pictures.items() if images_seen > before.until}
        for images_seen, file in new.items():
            png = file.read()
            self._mlflow.log_picture(series, png, images_seen, time_ms_of(png) or self._card.created_ms)
        if new and series == run_folder.SAMPLES:
            self._mlflow.log_file(mlflow_pages.GRID, png)
        if new:
            self._mark(**{series: Series(len(pictures), max(pictures))})

    def _push_pictures(self) -> None:
        """Pictures of the finished run, and its last grid at step 0: runs of any length are shown side by side."""
        folder = self._location.child(run_folder.PICTURES)
        grids = run_folder.pictures(self._location, run_folder.SAMPLES)
        names = folder.files()
        is_finished = self._status is not None and self._status.status == RunStatus.FINISHED
        last = max(grids) if grids and is_finished else None
        digest = _digest(names, last)
        if digest == self._sent.pictures or not (names or last):
            return
        for name in names:
            self._mlflow.log_file(f"{run_folder.PICTURES}/{name}", folder.child(name).read())
        if last is not None:
            self._mlflow.log_picture(mlflow_pages.LAST_GRID, grids[last].read(), 0, self._card.created_ms)
        self._mark(pictures=digest)

    def _push_evaluations(self) -> None:
        """Results of ddpm evaluate: points, and the files with everything."""
        folder = self._location.child(run_folder.EVALUATIONS)
        names = folder.files()
        reports = read_reports(folder, self._warn)
        times = {name: report.time_ms for name, report in reports.items()}
        digest = _digest(names, times)
        if digest == self._sent.evaluations or not names:
            return
        rows = evaluations.rows_of(reports.values())
        for start in range(0, len(rows), METRICS_PER_CALL):
            self._mlflow.log_metrics(rows[start : start + METRICS_PER_CALL])
        for name in names:
            self._mlflow.log_file(f"evaluation/{name}", folder.child(name).read())
        self._mark(evaluations=digest)

    def _describe(self) -> None:
        """The description, unless somebody has written another one."""
        if not self._mlflow.tags.get(mlflow_pages.NOTE_TAG, mlflow_pages.NOTE_END).endswith(
            mlflow_pages.NOTE_END
        ):
            return
        images_seen = self._status.images_seen if self._status else 0
        facts = mlflow_pages.Described(
            tags=self._mlflow.tags,
            config=self._now,
            status=self._status.status if self._status else RunStatus.RUNNING,
            images_seen=images_seen,
            metrics=self._mlflow.metrics(),
            run_id=self._mlflow.run_id,
            folder=self._location.uri,
        )
        self._mlflow.set_tags({mlflow_pages.NOTE_TAG: mlflow_pages.description(facts)})


def _sent(tag: str | None) -> Sent:
    """The content of SENT_TAG; nothing sent, if there is no such tag, or it is of another version."""
    if tag is not None:
        with suppress(UserError):
            return strict_json.parse(Sent, tag, SENT_TAG)
    return Sent()


def _tags(card: Card, status: Status | None, config: Config) -> dict[str, str]:
    """Preset, changes, command, versions and hardware."""
    preset = card.preset
    changed = card.changed
    if not preset:
        preset, changed = run_params.nearest_preset(config)
    tags = {"preset": preset, "changed": run_params.changed_text(changed), **card.versions}
    if card.command:
        tags["command"] = card.command
    if status is not None and status.hardware:
        tags["hardware"] = status.hardware
    return tags


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
