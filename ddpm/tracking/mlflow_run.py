"""One run in MLflow, found by its run key, a tag."""

import io
import json
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ddpm.runs.curves import CurveRow
from ddpm.runs.run_folder import Data, RunStatus
from ddpm.tracking.mlflow_client import Connection, MlflowError, Refused, database_file, without_password

log = logging.getLogger(__name__)

RUN_KEY_TAG = "ddpm.run_key"
PARENT_TAG = "mlflow.parentRunId"
IMAGES_TAG = "mlflow.loggedImages"
MAX_PER_CALL = 100
"""Params or tags in a call, MLflow's limit."""
METRICS_PER_CALL = 1000
THUMBNAIL_SIDE = 256
REFUSALS = 3
"""A value is skipped after this many refusals: MLflow also answers BAD_REQUEST when two processes insert one row."""
REFUSAL_PAUSE_S = 0.3


class DeletedRun(MlflowError):
    """A run was deleted in MLflow."""


class MlflowRun:
    """A run that MLflow has. All methods may be repeated with the same arguments, and then change nothing.

    They raise MlflowError if MLflow does not answer, or refuses the whole run. A single value that MLflow will never
    accept is skipped, with a line to `warn`.

    Attributes:
        tags, params: those that MLflow had when the run was opened, and those sent since.
    """

    def __init__(self, mlflow: Connection, run: Any, warn: Callable[[str], object] = log.warning) -> None:
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.tags = dict(run.data.tags)
        self.params = dict(run.data.params)
        self._mlflow = mlflow
        self._client = mlflow.client
        self._warn = warn
        self._status = run.info.status
        self._ended_ms = run.info.end_time

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log params that MLflow does not have; a param never changes there."""
        from mlflow.entities import Param

        new = {name: str(value) for name, value in params.items() if name not in self.params}
        self._log(
            "params", {f"param {name}": Param(name, value) for name, value in new.items()}, MAX_PER_CALL
        )
        self.params |= new

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        from mlflow.entities import RunTag

        new = {name: value for name, value in tags.items() if self.tags.get(name) != value}
        self._log("tags", {f"tag {name}": RunTag(name, value) for name, value in new.items()}, MAX_PER_CALL)
        self.tags |= new

    def delete_tag(self, name: str) -> None:
        """Delete a tag."""
        try:
            self._mlflow(self._client.delete_tag, self.run_id, name)
        except MlflowError:
            if name in self._mlflow(self._client.get_run, self.run_id).data.tags:
                raise
            # Another process has deleted it.
        self.tags.pop(name, None)

    def log_metrics(self, rows: Iterable[CurveRow]) -> None:
        """Log at most METRICS_PER_CALL values. MLflow holds each name, step, time and value once."""
        from mlflow.entities import Metric

        metrics = {
            f"metric {row.name} at {row.images_seen}, {row.timestamp_ms}": Metric(
                row.name, row.value, row.timestamp_ms, row.images_seen
            )
            for row in sorted(rows)  # MLflow's page Compare begins with what was logged first
        }
        self._log("metrics", metrics, METRICS_PER_CALL)

    def log_picture(self, key: str, png: bytes, images_seen: int, timestamp_ms: int) -> None:
        """Log an image as MlflowClient.log_image does (MLflow 3.11 and later), but under a reproducible name."""
        name = f"images/{key}+step+{images_seen}+timestamp+{timestamp_ms}"
        stem = f"{name}+{uuid.uuid5(uuid.NAMESPACE_URL, name)}"
        self.log_file(f"{stem}.png", png)
        self.log_file(f"{stem}+compressed.webp", _thumbnail(png))
        self.set_tags({IMAGES_TAG: "True"})

    def log_file(self, name: str, data: bytes) -> None:
        """Write `data` as the artifact `name`; an existing one is replaced."""
        folder, _, base = name.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="ddpm-mlflow-") as temporary:
            path = Path(temporary, base)
            path.write_bytes(data)
            self._try(f"file {name}", self._client.log_artifact, self.run_id, str(path), folder or None)

    def log_data(self, data: Data) -> None:
        """Log the data set as the input of training."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = {
            "split": data.split,
            "images": data.num_images,
            "shape": data.shape,
            "classes": data.num_classes,
            "fingerprint": data.fingerprint,
        }
        source_type = "s3" if data.uri.startswith("s3://") else "local"
        source = json.dumps({"uri": data.uri})
        digest = data.fingerprint[:32]  # MLflow's limit is 36
        entity = Dataset(data.source, digest, source_type, source, profile=json.dumps(profile))
        context = [InputTag("mlflow.data.context", "training")]
        self._try(
            f"data set {data.source}", self._client.log_inputs, self.run_id, [DatasetInput(entity, context)]
        )

    def set_status(self, status: RunStatus, ended_ms: int | None = None) -> None:
        """Set the status, and the time of the end."""
        word = status.in_mlflow
        if status == RunStatus.RUNNING:
            if self._status != word:
                self._try(f"status {word}", self._client.update_run, self.run_id, status=word)
        elif (word, ended_ms or self._ended_ms) != (self._status, self._ended_ms):
            self._try(f"status {word}", self._client.set_terminated, self.run_id, word, ended_ms)
        self._status = word
        self._ended_ms = ended_ms

    def metrics(self) -> dict[str, float]:
        """The newest value of each metric in MLflow."""
        return dict(self._mlflow(self._client.get_run, self.run_id).data.metrics)

    def _log(self, kind: str, named: Mapping[str, Any], max_per_call: int) -> None:
        """Log params, tags or metrics: halves if they are too many, or refused, so that a bad one stops no other."""
        if not named:
            return
        if len(named) == 1:
            name, item = next(iter(named.items()))
            self._try(name, self._client.log_batch, self.run_id, **{kind: [item]})
            return
        if len(named) <= max_per_call:
            try:
                self._mlflow(self._client.log_batch, self.run_id, **{kind: list(named.values())})
                return
            except Refused:
                pass
        items = list(named.items())
        half = len(named) // 2
        self._log(kind, dict(items[:half]), max_per_call)
        self._log(kind, dict(items[half:]), max_per_call)

    def _try(self, what: str, call: Callable[..., object], *args: Any, **named: Any) -> None:
        """Make a call; what MLflow will never accept is skipped, with a line."""
        for tries_left in reversed(range(REFUSALS)):
            try:
                self._mlflow(call, *args, **named)
                return
            except Refused as error:
                if tries_left:
                    time.sleep(REFUSAL_PAUSE_S)
                    continue
                # MLflow refuses all values of a deleted run, also valid ones.
                if self._mlflow(self._client.get_run, self.run_id).info.lifecycle_stage != "active":
                    # It may have been the younger of two runs: the next push finds the older one, or raises.
                    raise MlflowError(f"run {self.run_id} was deleted in MLflow", is_temporary=True) from None
                self._warn(f"MLflow refuses {what}, which is skipped: {error}")


def find(mlflow: Connection, experiment: str, run_key: str) -> Any:
    """The MLflow run with this run key, or None.

    If two processes have created one each, the older stays, and the other is deleted.

    Raises:
        DeletedRun: it was deleted in MLflow.
    """
    from mlflow.entities import ViewType

    client = mlflow.client
    existing = mlflow(client.get_experiment_by_name, experiment)
    if existing is None:
        return None
    matching = f"tags.`{RUN_KEY_TAG}` = '{run_key}'"
    found = mlflow(client.search_runs, [existing.experiment_id], matching, ViewType.ALL)
    active = [run for run in found if run.info.lifecycle_stage == "active"]
    active.sort(key=lambda run: (run.info.start_time, run.info.run_id))
    for younger in active[1:]:
        mlflow(client.delete_run, younger.info.run_id)
    if found and not active:
        uri = without_password(mlflow.uri)
        raise DeletedRun(f"run {found[0].info.run_id} was deleted in MLflow at {uri}; restore it there")
    return active[0] if active else None


def open_run(
    mlflow: Connection,
    experiment: str,
    run_key: str,
    name: str,
    *,
    source: str = "ddpm train",
    began_ms: int | None = None,
    warn: Callable[[str], object] = log.warning,
) -> MlflowRun:
    """The MLflow run with this run key, which is created, in the experiment of this name, if there is none.

    Args:
        source: the program that starts the run.
        began_ms: when the run began, in milliseconds since 1970; None: now.
    """
    run = find(mlflow, experiment, run_key)
    if run is None:
        tags = {RUN_KEY_TAG: run_key, "mlflow.source.type": "JOB", "mlflow.source.name": source}
        where = experiment_id(mlflow, experiment)
        mlflow(mlflow.client.create_run, where, start_time=began_ms, tags=tags, run_name=name)
        run = find(mlflow, experiment, run_key)  # another process may have created one, too
    return MlflowRun(mlflow, run, warn)


def experiment_id(mlflow: Connection, name: str) -> str:
    """The id of the experiment `name`, which is created if there is none."""
    client = mlflow.client
    experiment = mlflow(client.get_experiment_by_name, name)
    if experiment is not None:
        return str(experiment.experiment_id)
    database = database_file(mlflow.uri)  # None: a server, which knows its own folder
    folder = None if database is None else (database.absolute().parent / "mlruns").as_uri()
    try:
        return str(mlflow(client.create_experiment, name, folder))
    except MlflowError:
        experiment = mlflow(client.get_experiment_by_name, name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)  # another process was faster


def _thumbnail(png: bytes) -> bytes:
    """The small WebP that MLflow's pages show first."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        picture.save(file, "WEBP")
    return file.getvalue()
