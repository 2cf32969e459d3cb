"""Runs in MLflow: one logical run is one MLflow run, and each record arrives there once.

A run is found by its run key, a tag, also after restarts. Records that were sent before are recognised:

- A metric sent again is the same point, since it keeps its time: MLflow holds each key, step, time and value once.
- A picture sent again has the same file name, and so does an artifact.
- A run resumed from an earlier checkpoint measures again, at other times. The tag `ddpm.sent_until`, set before records
  are sent, holds their largest images_seen; records up to there are skipped if MLflow has their key and step.

Values measured outside training (`add`) do not change that tag; a value that MLflow already has is skipped.

`ddpm.tracking.uploader` handles threads and storage.
"""

import io
import json
import logging
import math
import re
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ddpm.tracking import pages
from ddpm.tracking.metrics_buffer import Artifact, DataSetInput, Metrics, Picture, Record, Tags
from ddpm.tracking.mlflow_client import Lost, connect, database_file
from ddpm.tracking.retry import ATTEMPTS, Caller, Failed, Refused

logger = logging.getLogger(__name__)

RUN_KEY_TAG = "ddpm.run_key"
PARENT_TAG = "mlflow.parentRunId"
SENT_UNTIL_TAG = "ddpm.sent_until"
IMAGES_TAG = "mlflow.loggedImages"
MAX_PER_CALL = {"params": 100, "metrics": 1000}
PICTURE_KEY = re.compile(r"[a-zA-Z0-9_\-./ ]+")
PICTURE_FILE = re.compile(r"(images/(.+)\+step\+(\d+)\+timestamp\+\d+\+[0-9a-f-]+)\.png")
THUMBNAIL_SIDE = 256


@dataclass(frozen=True)
class Address:
    """MLflow's URI, and the identity of a run there."""

    uri: str
    experiment: str
    run_name: str
    run_key: str
    parent_run_id: str | None = None
    """The parent run in MLflow."""
    source: str = "jobs/train.py"
    """The program that starts the run."""


def experiment_id(client: Any, uri: str, name: str) -> str:
    """The id of the experiment `name`, which is created if there is none."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    database = database_file(uri)  # None: a server, which knows its own folder
    folder = None if database is None else (database.absolute().parent / "mlruns").as_uri()
    return client.create_experiment(name, folder)


def find_run(client: Any, experiment: str, run_key: str) -> Any:
    """The MLflow run with this run key, or None."""
    existing = client.get_experiment_by_name(experiment)
    if existing is None:
        return None
    matching = f"tags.`{RUN_KEY_TAG}` = '{run_key}'"
    runs = client.search_runs([existing.experiment_id], matching, max_results=1)
    return runs[0] if runs else None


class MlflowRun:
    """One logical run in MLflow, for one thread.

    Args:
        params: the flat config; logged once.
        patience_s: seconds without a successful call after which time is up.

    Methods raise OutOfTime if MLflow did not answer in time, and Lost if it refuses the run or the run was deleted.
    """

    def __init__(self, address: Address, params: Mapping[str, Any], patience_s: float = math.inf) -> None:
        self._address, self._params = address, params
        self.call = Caller(address.uri, self._answers, patience_s)
        """Makes all calls to MLflow, and holds their deadline."""
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._client: Any = None
        self._sent_until = -1
        self._points: set[tuple[str, int]] = set()
        self._pictures: dict[tuple[str, int], str] = {}

    def open(self, running: bool) -> None:
        """Find or create the run, and update its params; with `running` also its status."""
        from mlflow.entities import Param

        self._client = self._call_or_lost(connect, self._address.uri)
        known = self._call_or_lost(self._find, running)
        new = {f"param {n}": Param(n, str(v)) for n, v in self._params.items() if n not in known}
        if not self._send_batch("params", list(new.items()), attempts=math.inf):
            raise Lost(self.call.last_error)

    def find(self) -> bool:
        """Whether MLflow has the run. Nothing is created or changed there."""
        database = database_file(self._address.uri)
        if database is not None and not database.exists():
            return False
        self._client = self._call_or_lost(connect, self._address.uri)
        run = self._call_or_lost(find_run, self._client, self._address.experiment, self._address.run_key)
        if run is not None:
            self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        return run is not None

    def send(self, records: Sequence[Record]) -> bool:
        """Deliver one segment. Records that MLflow will never accept are skipped, with a warning.

        Returns:
            Whether all is delivered. If not, `call.last_error` gives the reason: send the whole segment again later.
        """
        return self._deliver(records, self._look_up)

    def add(self, records: Sequence[Record]) -> bool:
        """Deliver values measured outside training, as `send` does, but without changing `ddpm.sent_until`.

        A metric is skipped if MLflow's newest value of it at that step is the same.
        """
        return self._deliver(records, self._look_for_same)

    def _deliver(self, records: Sequence[Record], look: Callable[[Sequence[Record]], None]) -> bool:
        """Deliver `records`, except for the metrics that `look` has put into self._points."""
        from mlflow.entities import Metric

        if not self._try("the query of what it already has", look, records):
            return False
        points = [
            Metric(key, value, record.timestamp_ms, record.images_seen)
            for record in records
            if isinstance(record, Metrics)
            for key, value in record.values.items()
            if (key, record.images_seen) not in self._points
        ]
        points.sort(key=lambda point: point.key)  # MLflow's page Compare begins with what was logged first
        done = self._send_batch("metrics", [(f"metric {p.key} at {p.step}", p) for p in points])
        for record in records:
            if isinstance(record, Picture):
                what = f"image {record.key} at {record.images_seen}"
                done &= self._try(what, self._send_picture, record)
            elif isinstance(record, Artifact):
                done &= self._try(f"file {record.name}", self._upload, record.name, record.data)
            elif isinstance(record, Tags):
                done &= self._try("the tags", self._send_tags, record)
            elif isinstance(record, DataSetInput):
                done &= self._try(f"data set {record.name}", self._send_data_set, record)
        return done and self._try("the description", self._describe)

    def end(self, status: str) -> bool:
        """Set the status of the ended run, such as FINISHED or pages.STOPPED; returns whether MLflow took it."""
        return self._try("the status", self._end, status)

    def _end(self, status: str) -> None:
        if self._client.get_run(self.run_id).info.status != status:  # else it would get another end time
            self._client.set_terminated(self.run_id, status)
        self._describe()

    def _find(self, running: bool) -> Mapping[str, str]:
        """Find or create the run; returns the params that it had."""
        client, address = self._client, self._address
        self.experiment_id = experiment_id(client, address.uri, address.experiment)
        run = find_run(client, address.experiment, address.run_key)
        if run is not None:
            if running:
                client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {RUN_KEY_TAG: address.run_key}
            tags |= {"mlflow.source.type": "JOB", "mlflow.source.name": address.source}
            if address.parent_run_id is not None:
                tags[PARENT_TAG] = address.parent_run_id
            run = client.create_run(self.experiment_id, run_name=address.run_name, tags=tags)
        run_id, known = run.info.run_id, run.data.params
        for name, value in self._params.items():  # MLflow's params never change; a resumed run's may
            tag = f"resumed.{name}"
            if name in known and run.data.tags.get(tag, known[name]) != str(value):
                client.set_tag(run_id, tag, str(value))
        self._sent_until = int(run.data.tags.get(SENT_UNTIL_TAG, -1))
        self.run_id = run_id
        return known

    def _look_for_same(self, records: Sequence[Record]) -> None:
        """Look up which metrics of `records` MLflow already has with these values."""
        self._points, self._pictures = set(), {}
        for record in (record for record in records if isinstance(record, Metrics)):
            for key, value in record.values.items():
                history = self._client.get_metric_history(self.run_id, key)
                there = [point for point in history if point.step == record.images_seen]
                if there and max(there, key=lambda point: point.timestamp).value == value:
                    self._points.add((key, record.images_seen))

    def _look_up(self, records: Sequence[Record]) -> None:
        """Set `ddpm.sent_until` before any of `records` is sent, and look up which of them MLflow has."""
        timed = [record for record in records if isinstance(record, Metrics | Picture)]
        until = max((record.images_seen for record in timed), default=-1)
        if until > self._sent_until:
            self._client.set_tag(self.run_id, SENT_UNTIL_TAG, str(until))
        doubtful = [record for record in timed if record.images_seen <= self._sent_until]
        self._points, self._pictures = set(), {}
        for key in {key for record in doubtful if isinstance(record, Metrics) for key in record.values}:
            history = self._client.get_metric_history(self.run_id, key)
            self._points |= {(key, point.step) for point in history}
        if any(isinstance(record, Picture) for record in doubtful):
            for file in self._client.list_artifacts(self.run_id, "images"):
                if match := PICTURE_FILE.fullmatch(file.path):
                    self._pictures[match[2], int(match[3])] = match[1]
        self._sent_until = max(until, self._sent_until)

    def _send_batch(self, kind: str, named: list[tuple[str, Any]], attempts: float = ATTEMPTS) -> bool:
        """Send params or metrics: halves if they are too many, or refused, so that a bad one stops no other."""
        if len(named) < 2:
            return all(self._try(name, self._log, kind, [item], attempts=attempts) for name, item in named)
        if len(named) <= MAX_PER_CALL[kind]:
            try:
                self.call(self._log, kind, [item for _, item in named], attempts=attempts)
                return True
            except Refused:
                pass
            except Failed:
                attempts = 1
        half = len(named) // 2
        first = self._send_batch(kind, named[:half], attempts)
        return self._send_batch(kind, named[half:], attempts) and first

    def _log(self, kind: str, items: list[Any]) -> None:
        self._client.log_batch(self.run_id, **{kind: items})

    def _send_picture(self, picture: Picture) -> None:
        """Log an image as MlflowClient.log_image does (MLflow 3.11 and later), but under a reproducible name."""
        if not PICTURE_KEY.fullmatch(picture.key):
            raise Refused(f"{picture.key!r:.80} cannot be an image's key; use letters, digits and _-./")
        key = picture.key.replace("/", "~")
        name = f"images/{key}+step+{picture.images_seen}+timestamp+{picture.timestamp_ms}"
        unique = uuid.uuid5(uuid.NAMESPACE_URL, name)
        stem = self._pictures.get((key, picture.images_seen), f"{name}+{unique}")
        self._upload(f"{stem}.png", picture.png)
        self._upload(f"{stem}+compressed.webp", _thumbnail(picture.png))
        self._client.set_tag(self.run_id, IMAGES_TAG, "True")

    def _send_tags(self, record: Tags) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in record.tags.items()])

    def _send_data_set(self, record: DataSetInput) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source_type = "s3" if record.uri.startswith("s3://") else "local"
        source = json.dumps({"uri": record.uri})
        data_set = Dataset(record.name, record.digest, source_type, source, profile=record.profile)
        context = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self.run_id, [DatasetInput(data_set, context)])

    def _describe(self) -> None:
        run = self._client.get_run(self.run_id)
        if (text := pages.description(run)) and text != run.data.tags.get(pages.NOTE_TAG):
            self._client.set_tag(self.run_id, pages.NOTE_TAG, text)

    def _upload(self, name: str, data: bytes) -> None:
        """Write `data` as the artifact `name`; an existing one is replaced."""
        folder, _, base = name.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="ddpm-mlflow-") as temporary:
            path = Path(temporary, base)
            path.write_bytes(data)
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def _try(self, what: str, call: Any, *args: Any, attempts: float = ATTEMPTS) -> bool:
        """Make a call; False: repeat it later. What MLflow will never accept is skipped, with a warning."""
        try:
            self.call(call, *args, attempts=attempts)
        except Refused as error:
            # MLflow refuses all records of a deleted run, however valid.
            if self._call_or_lost(self._client.get_run, self.run_id).info.lifecycle_stage != "active":
                raise Lost(f"run {self.run_id} was deleted in MLflow") from None
            logger.warning("MLflow refuses %s, which is skipped: %s", what, error)
        except Failed:
            return False
        return True

    def _call_or_lost(self, call: Any, *args: Any) -> Any:
        """The result of call(*args); raises Lost after a permanent failure."""
        try:
            return self.call(call, *args)
        except Failed as error:
            raise Lost(str(error)) from None

    def _answers(self) -> bool:
        """Whether MLflow answers a query for this run; False before the run was found.

        Raises:
            Lost: its SQLite file was deleted.
        """
        database = database_file(self._address.uri)
        if self.run_id is not None and database is not None and not database.exists():
            raise Lost(f"{database} was deleted")
        try:
            return self.run_id is not None and bool(self._client.get_run(self.run_id))
        except Exception:
            return False


def _thumbnail(png: bytes) -> bytes:
    """The small WebP that MLflow's pages show first."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        picture.save(file, "WEBP")
    return file.getvalue()
