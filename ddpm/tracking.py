"""MLflow, at arm's length: what is tracked goes into a queue, and a thread of our own delivers it.

Training never waits for MLflow and never fails because of it. Whatever cannot be delivered now is tried
again until the run closes. One logical run is one MLflow run, also across restarts: it is found by its run
key, kept as a tag.
"""

import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tenacity
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

SQLITE = "sqlite:///"
RUN_KEY_TAG = "ddpm.run_key"
SYSTEM_INTERVAL_S = 10.0
MAX_PARAMS_PER_CALL = 100
MAX_METRICS_PER_CALL = 1000
PERMANENT = (
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)
"""What MLflow says of a call that will never work."""
USER_INFO = re.compile(r"//[^/\s@]*@")


@dataclass(frozen=True)
class Address:
    """Where MLflow is and which run of it is meant; travels to the worker that tracks."""

    uri: str
    experiment: str
    run_name: str
    run_key: str


@dataclass(frozen=True)
class Delivery:
    """How tracking ended."""

    run_id: str | None
    experiment_id: str | None
    undelivered: int
    """Metrics, pictures and files that could not be delivered in time."""


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the working folder: what `mlflow ui` there will show.

    A SQLite file's path is made absolute: the process that tracks may run in another folder.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    return SQLITE + str(Path(uri.removeprefix(SQLITE)).absolute()) if uri.startswith(SQLITE) else uri


class MlflowTracker:
    """Delivers curves and pictures of one run to MLflow in the background; a `runtime.Tracker`.

    Args:
        address: of the run.
        params: the flat config; logged once.
    """

    def __init__(self, address: Address, params: Mapping[str, Any]) -> None:
        self._address, self._params = address, params
        self._todo: queue.Queue[_Metrics | _Call] = queue.Queue()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._run_id: str | None = None
        self._experiment_id: str | None = None
        self._status = "FINISHED"
        self._ended = False
        # One quick attempt a call: retrying is this thread's business, and it must see the end coming.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it may hold a password
        self._thread = threading.Thread(target=self._deliver_all, name="ddpm-mlflow", daemon=True)
        self._thread.start()

    def metrics(self, values: dict[str, float], images_seen: int) -> None:
        self._todo.put(_Metrics(dict(values), images_seen, _now_ms()))

    def image(self, key: str, image: NDArray[np.uint8], images_seen: int) -> None:
        at = {"key": key, "step": images_seen, "timestamp": _now_ms()}
        self._todo.put(_Call(lambda client, run_id: client.log_image(run_id, image, synchronous=True, **at)))

    def artifact(self, name: str, data: bytes) -> None:
        def log(client: Any, run_id: str) -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, Path(name).name)
                path.write_bytes(data)
                client.log_artifact(run_id, str(path), name.rpartition("/")[0] or None)

        self._todo.put(_Call(log))

    def close(self, status: str = "FINISHED", timeout_s: float = 60.0) -> Delivery:
        """Deliver the rest, for at most `timeout_s`, and end the MLflow run with `status`."""
        self._status, self._deadline = status, time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s + 1)
        undelivered = self._todo.unfinished_tasks
        if undelivered or not self._ended:
            uri = without_password(self._address.uri)
            logger.warning("MLflow at %s did not take everything (%d items left)", uri, undelivered)
        return Delivery(self._run_id, self._experiment_id, undelivered)

    # From here on: the thread.

    def _deliver_all(self) -> None:
        try:
            client = self._try(_import_client, self._address.uri)
            self._try(self._open, client)
            system = _SystemMetrics()
            while True:
                items = self._collect()
                self._deliver(client, items)
                if not items and self._closing.is_set():
                    break
                if (values := system.due()) and not self._closing.is_set():
                    self.metrics(values, int(time.time()) - system.began)
            self._try(client.set_terminated, self._run_id, self._status)
            self._ended = True
        except _OutOfTime:
            pass  # close says so
        except Exception as error:
            logger.error("tracking stopped, training goes on: %s", self._reason(error))

    def _collect(self) -> list["_Metrics | _Call"]:
        """What is waiting, after waiting a moment for something."""
        items: list[_Metrics | _Call] = []
        try:
            items.append(self._todo.get(timeout=0.2))
            while len(items) < 100:
                items.append(self._todo.get_nowait())
        except queue.Empty:
            pass
        return items

    def _deliver(self, client: Any, items: list["_Metrics | _Call"]) -> None:
        metrics = [item for item in items if isinstance(item, _Metrics)]
        if not self._hand_over(metrics, self._log_batches, client, metrics):
            for points in metrics:  # one of them is refused: the others need not suffer
                self._hand_over([points], self._log_batches, client, [points])
        for item in items:
            if isinstance(item, _Call):
                self._hand_over([item], self._try, item.call, client, self._run_id)

    def _hand_over(
        self, items: Sequence["_Metrics | _Call"], deliver: Callable[..., None], *args: Any
    ) -> bool:
        """Whether deliver(*args) delivered `items`; what MLflow will never accept is logged and left out."""
        try:
            deliver(*args)
        except _OutOfTime:
            raise
        except Exception as error:
            if len(items) == 1:
                logger.warning("MLflow refuses an item, which is left out: %s", self._reason(error))
            return False
        for _ in items:
            self._todo.task_done()
        return True

    def _log_batches(self, client: Any, items: list["_Metrics"]) -> None:
        """Sent twice, a point is still one point: MLflow keeps each key, step, time and value once."""
        from mlflow.entities import Metric

        points = [
            Metric(key, float(value), item.timestamp_ms, item.images_seen)
            for item in items
            for key, value in item.values.items()
        ]
        for i in range(0, len(points), MAX_METRICS_PER_CALL):
            self._try(client.log_batch, self._run_id, metrics=points[i : i + MAX_METRICS_PER_CALL])

    def _open(self, client: Any) -> None:
        """Find this run by its key, or create it; bring its params and status up to date."""
        from mlflow.entities import Param

        experiment = client.get_experiment_by_name(self._address.experiment)
        self._experiment_id = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(self._address.experiment, _artifact_folder(self._address.uri))
        )
        key = self._address.run_key
        found = client.search_runs([self._experiment_id], f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1)
        if found:
            run = found[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {RUN_KEY_TAG: key, "mlflow.source.name": "jobs/train.py", "mlflow.source.type": "JOB"}
            run = client.create_run(self._experiment_id, run_name=self._address.run_name, tags=tags)
        self._run_id = run.info.run_id
        known = run.data.params
        new = [Param(name, str(value)) for name, value in self._params.items() if name not in known]
        for i in range(0, len(new), MAX_PARAMS_PER_CALL):
            client.log_batch(self._run_id, params=new[i : i + MAX_PARAMS_PER_CALL])
        for name, value in self._params.items():  # MLflow's params never change; a resumed run's may
            if name in known and known[name] != str(value):
                client.set_tag(self._run_id, f"resumed.{name}", str(value))

    def _try(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call until it works, time is up (_OutOfTime), or MLflow says that it never will."""
        for attempt in tenacity.Retrying(
            wait=tenacity.wait_exponential(multiplier=0.5, max=10),
            sleep=lambda seconds: self._sleep(seconds),
            retry=tenacity.retry_if_exception(_is_temporary),
            before_sleep=self._warn_once,
        ):
            with attempt:
                return call(*args, **kwargs)
        raise AssertionError("unreachable")

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if time.monotonic() > self._deadline:
                raise _OutOfTime
            time.sleep(0.1)

    def _warn_once(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            reason, uri = self._reason(state.outcome.exception()), without_password(self._address.uri)
            logger.warning("MLflow at %s is not taking data (%s); training goes on, retrying", uri, reason)

    def _reason(self, error: BaseException | None) -> str:
        """A line of `error`, without the password that MLflow's messages quote with the URI."""
        text = str(error).replace(self._address.uri, without_password(self._address.uri))
        return f"{type(error).__name__}: {USER_INFO.sub('//', ' '.join(text.split()))[:200]}"


@dataclass(frozen=True)
class _Metrics:
    values: dict[str, float]
    images_seen: int
    timestamp_ms: int


@dataclass(frozen=True)
class _Call:
    call: Callable[[Any, str], Any]
    """Of a client and a run's ID."""


class _OutOfTime(Exception):
    """The deadline passed with work left."""


class _SystemMetrics:
    """CPU, memory, disk and network of this node, as MLflow's own monitors measure them."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.began = int(time.time())
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        self._next = time.monotonic() + 1

    def due(self) -> dict[str, float]:
        """A sample every SYSTEM_INTERVAL_S; else nothing."""
        if time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + SYSTEM_INTERVAL_S
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values


def _import_client(uri: str) -> Any:
    """A client; MLflow takes seconds to import, so it happens here, off the training thread."""
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(uri)


def _is_temporary(error: BaseException) -> bool:
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code not in PERMANENT
    status = getattr(getattr(error, "response", None), "status_code", 500)  # files travel by plain HTTP
    return isinstance(error, OSError) and (status >= 500 or status in (408, 429))  # requests' are OSErrors


def _artifact_folder(uri: str) -> str | None:
    """Beside a SQLite file, wherever the process that tracks happens to run; a server knows its own."""
    if not uri.startswith(SQLITE):
        return None
    return (Path(uri.removeprefix(SQLITE)).absolute().parent / "mlruns").as_uri()


def without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if separator else uri


def _now_ms() -> int:
    return int(time.time() * 1000)
