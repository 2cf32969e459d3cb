"""MLflow as a callback of any Ray Train trainer: what workers report arrives there once, and training never waits.

Reports are kept in a spool, a folder or a bucket, until MLflow has them (`ddpm.tracking.uploader`). A new run of the
same name and spool goes on in the same MLflow run. docs/tracking.md says what happens when something dies.
"""

import logging
import numbers
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import tenacity
from ray.train import UserCallback

from ddpm.checkpoints import runs
from ddpm.storage.locations import Location
from ddpm.tracking.metrics_buffer import MetricsBuffer, segment_name
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.mlflow_runs import Address
from ddpm.tracking.spool import FOLDER as SPOOL
from ddpm.tracking.uploader import DELIVERY_TIMEOUT_S, Delivery, Uploader

logger = logging.getLogger(__name__)

SPOOL_TIMEOUT_S = 1.0
"""A report waits at most so long until it lies in the spool."""
_RETRY = tenacity.Retrying(
    wait=tenacity.wait_random_exponential(max=10),
    before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
)
"""For as long as it takes: what waits meanwhile is in memory."""


class MlflowCallback(UserCallback):
    """Logs the numbers that rank 0 reports, as Ray Train keeps rank 0's with a checkpoint.

    As a context manager around `trainer.fit()` it also delivers what is left, and ends the MLflow run.

    Args:
        experiment: of MLflow.
        run_name: name of the MLflow run, and of the folder in the spool.
        spool: a folder that this node sees, or s3://bucket/prefix.
        step: the reported metric that counts steps: a report without it is left out. Of a step that is reported
            again, after a restart, the first value of each metric stays.
        params: logged once.

    Raises:
        UserError: the spool cannot be written, or run_name is no name for a folder.
    """

    def __init__(
        self,
        experiment: str,
        run_name: str,
        spool: str,
        step: str = "step",
        params: Mapping[str, Any] | None = None,
    ) -> None:
        run = runs.open_run(run_name, spool)
        source = Path(sys.argv[0]).name
        self._address = Address(tracking_uri(), experiment, run.name, run.key, source=source)
        self._params, self._step = dict(params or {}), step
        self._folder, self._spool = run.location.uri, run.location.child(SPOOL)
        self._delivery: _Delivery | None = None  # of the controller's process alone
        self._has_warned = False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train's controller, which an error would end: it is logged once."""
        try:
            step = int(metrics[0][self._step])
            if step < 0:
                raise ValueError(f"{self._step} is {step}")
            if self._delivery is None:
                self._delivery = _Delivery(Uploader(self._address, self._params, self._spool), self._spool)
            values = {name: float(v) for name, v in metrics[0].items() if isinstance(v, numbers.Real)}
            self._delivery.add(values, step)
        except Exception as error:
            if not self._has_warned:
                logger.warning(
                    "a report is logged to MLflow only if it has its step as %r: %r", self._step, error
                )
            self._has_warned = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, Exception):
            self.close("FAILED" if error else "FINISHED")
        else:  # after Ctrl-C nothing is waited for
            self.close("KILLED", timeout_s=1.0)

    def close(self, status: str, timeout_s: float = DELIVERY_TIMEOUT_S) -> Delivery:
        """Deliver what is left, as `Uploader.close` does, and end the MLflow run: FINISHED, FAILED or KILLED."""
        delivery = Uploader(self._address, self._params, self._spool).close(status, timeout_s)
        if delivery.undelivered:
            command = f"python jobs/sync.py {self._folder} --experiment {self._address.experiment}"
            logger.warning("records that MLflow has not accepted are kept; `%s` delivers them", command)
        return delivery


class _Delivery:
    """From memory to the spool, in a thread of its own; the uploader's goes on from there."""

    def __init__(self, uploader: Uploader, spool: Location) -> None:
        self._uploader, self._spool = uploader, spool
        self._lock, self._wake, self._spooled = threading.Lock(), threading.Event(), threading.Event()
        self._spooled.set()
        self._buffer, self._gathered = MetricsBuffer(), set[tuple[str, int]]()
        threading.Thread(target=self._work, name="ddpm-mlflow-spool", daemon=True).start()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Wait for the spool, since Ray ends the controller as soon as workers are done; but not while it is behind."""
        with self._lock:
            is_behind = not self._spooled.is_set()
            self._spooled.clear()
            new = {name: value for name, value in values.items() if (name, step) not in self._gathered}
            self._buffer.metrics(new, step)
            self._gathered |= {(name, step) for name in new}
        self._wake.set()
        if not is_behind:
            self._spooled.wait(SPOOL_TIMEOUT_S)

    def _work(self) -> None:
        while self._wake.wait():
            self._wake.clear()
            with self._lock:
                data = self._buffer.take()
                self._gathered.clear()
            if data is not None:
                # Named by time, and as what no checkpoint makes final: it may be delivered once it lies there.
                file = self._spool.child(segment_name(time.time_ns() // 1000, after_error=True))
                _RETRY(file.write, data)
                self._uploader.committed(-1)
            with self._lock:
                if not self._gathered:
                    self._spooled.set()
