"""Reading runs back from MLflow: settings, curves, files. Nothing is created or changed there.

Methods raise Unreadable when MLflow does not answer, or refuses.
"""

import tempfile
from pathlib import Path
from typing import Any

from ddpm.tracking.metrics_buffer import Metrics
from ddpm.tracking.mlflow_client import Lost, connect, database_file
from ddpm.tracking.mlflow_runs import find_run
from ddpm.tracking.retry import Caller, OutOfTime, without_password
from ddpm.utils.errors import UserError

NO_SUCH_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for an unknown run id."""


class Unreadable(UserError):
    """MLflow cannot be reached, or refuses."""

    exit_code = 1


class RunReader:
    """The runs in MLflow at `uri`.

    Args:
        timeout_s: seconds without a successful call after which this call and all later ones fail.
    """

    def __init__(self, uri: str, timeout_s: float) -> None:
        self.where = without_password(uri)
        self._uri, self._client = uri, None
        self._call = Caller(uri, lambda: False, timeout_s)

    def by_id(self, run_id: str) -> "RecordedRun | None":
        """The run with this id, or None."""
        run = self._is_there() and self.client("get_run", run_id)
        return RecordedRun(self, run) if run else None

    def by_key(self, experiment: str, run_key: str) -> "RecordedRun | None":
        """The run of this experiment with this run key, or None."""
        there = self._is_there() and self.client("get_experiment_by_name", experiment)
        run = there and self.ask(find_run, self._client, there.experiment_id, run_key)
        return RecordedRun(self, run) if run else None

    def client(self, method: str, *args: Any) -> Any:
        """The result of a method of MLflow's client."""
        return self.ask(getattr(self._client, method), *args)

    def ask(self, call: Any, *args: Any) -> Any:
        """call(*args), with retries; None: MLflow knows no such run."""
        try:
            return self._call(call, *args)
        except Exception as error:
            if getattr(error, "error_code", None) in NO_SUCH_RUN:
                return None
            known = self._call.trouble if isinstance(error, OutOfTime) else ""
            why = str(error) if isinstance(error, Lost) else known or self._call.reason(error)
            raise Unreadable(f"MLflow at {self.where} cannot be read: {why}") from None

    def _is_there(self) -> bool:
        """Whether there is anything to read; if so, connect to it."""
        database = database_file(self._uri)
        if database is not None and not database.exists():
            return False
        if self._client is None:
            self._client = self.ask(connect, self._uri)
        return True


class RecordedRun:
    """A run as recorded in MLflow."""

    def __init__(self, reader: RunReader, run: Any) -> None:
        self._reader = reader
        self.run_id: str = run.info.run_id
        self.name: str = run.info.run_name or run.info.run_id
        self.params: dict[str, str] = dict(run.data.params)
        self.tags: dict[str, str] = dict(run.data.tags)

    def history(self, key: str) -> list[Metrics]:
        """All points of a metric, each as a record of one value."""
        points = self._reader.client("get_metric_history", self.run_id, key) or []
        return [Metrics({key: point.value}, point.step, point.timestamp) for point in points]

    def files(self, folder: str = "") -> list[str]:
        """Paths of the artifacts in a folder, sorted; none when there is no such folder."""
        found = self._reader.client("list_artifacts", self.run_id, folder or None) or []
        return sorted(file.path for file in found if not file.is_dir)

    def read(self, path: str) -> bytes:
        """Content of the artifact at `path`, as `files` lists it."""
        with tempfile.TemporaryDirectory(prefix="ddpm-mlflow-") as folder:
            there = self._reader.client("download_artifacts", self.run_id, path, folder)
            if there is None:
                raise Unreadable(f"MLflow at {self._reader.where} has no file {path} of run {self.name}")
            return Path(there).read_bytes()
