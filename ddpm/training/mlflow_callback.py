"""MLflow as a callback of any Ray Train trainer: each report reaches MLflow once, and training never waits for MLflow.

Reports are kept in a spool, a folder or a bucket, until MLflow has them (`ddpm.tracking.uploader`). A new run of the
same name and spool continues the same MLflow run. docs/tracking.md says what happens when something dies.
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
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.tracking.metrics_buffer import MetricsBuffer, pack, segment_name
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.mlflow_runs import Address
from ddpm.tracking.spool import FOLDER as SPOOL
from ddpm.tracking.uploader import DELIVERY_TIMEOUT_S, Delivery, Uploader

logger = logging.getLogger(__name__)

SPOOL_TIMEOUT_S = 1.0
"""Longest wait for a report to be in the spool."""
_RETRY = tenacity.Retrying(
    wait=tenacity.wait_random_exponential(max=10),
    before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
)
"""Retries without limit; reports that are not written yet stay in memory."""


class MlflowCallback(UserCallback):
    """Logs the numbers that rank 0 reports; Ray Train, too, keeps only those of rank 0 with a checkpoint.

    As a context manager around `trainer.fit()` it also delivers what is left, and ends the MLflow run.

    Args:
        experiment: name of the MLflow experiment.
        run_name: name of the MLflow run, and of the folder in the spool.
        spool: a folder that this node sees, or s3://bucket/prefix.
        step: the reported metric that counts steps; a report without it is skipped. If a step is reported again
            after a restart, the first value of each metric is kept.
        params: logged once.
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
        self._spool = run.location.child(SPOOL)
        self._call = f"MlflowCallback({experiment!r}, {run_name!r}, {locations.absolute(spool)!r})"
        self._delivery: _Delivery | None = None  # only in the controller's process
        self._has_warned = False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Spool rank 0's report; an error is only logged, once, since it would end Ray Train's controller."""
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
        else:  # after Ctrl-C, do not wait
            self.close("KILLED", timeout_s=1.0)

    def close(self, status: str, timeout_s: float = DELIVERY_TIMEOUT_S) -> Delivery:
        """Deliver what is left, as `Uploader.close` does, and end the MLflow run: FINISHED, FAILED or KILLED."""
        delivery = Uploader(self._address, self._params, self._spool).close(status, timeout_s)
        if delivery.undelivered:
            again = f"{self._call}.close({status!r})"
            logger.warning("records that MLflow has not accepted are kept; `%s` delivers them", again)
        return delivery


class _Delivery:
    """Writes reports from memory to the spool in a thread; the uploader's thread delivers them from there."""

    def __init__(self, uploader: Uploader, spool: Location) -> None:
        self._uploader, self._spool = uploader, spool
        self._lock, self._wake, self._spooled = threading.Lock(), threading.Event(), threading.Event()
        self._spooled.set()
        self._buffer, self._gathered = MetricsBuffer(), set[tuple[str, int]]()
        threading.Thread(target=self._work, name="ddpm-mlflow-spool", daemon=True).start()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add a report; wait for the spool unless it is behind, since Ray ends the controller when workers are done."""
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
                records = self._buffer.take()
                self._gathered.clear()
            if records:
                # Named by time, and as a segment after an error: it may be delivered without a checkpoint.
                file = self._spool.child(segment_name(time.time_ns() // 1000, after_error=True))
                _RETRY(file.write, pack(records))
                self._uploader.committed(-1)
            with self._lock:
                if not self._gathered:
                    self._spooled.set()
