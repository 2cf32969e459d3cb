"""Delivery of a run's segments from storage to MLflow: once they are final they are sent, then deleted.

MLflow may be away for any time: nothing is lost, training is not affected, and `jobs/sync.py` delivers later what a
run could not deliver before it ended.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ddpm.storage.locations import Location
from ddpm.tracking import metrics_buffer, spool
from ddpm.tracking.mlflow_client import Lost, reason, without_password
from ddpm.tracking.mlflow_runs import Address, MlflowRun
from ddpm.tracking.retry import OutOfTime
from ddpm.utils.errors import UserError

logger = logging.getLogger(__name__)

IDLE_S = 30.0
"""Interval at which unannounced segments are looked for, such as that of a run that failed."""
POSTPONE_S = 300.0
"""Interval after which a segment that MLflow did not take is tried again; it is also tried when the run ends."""
COUNT_TIMEOUT_S = 10.0
MIN_BEGIN_S = 5.0
"""Importing MLflow takes about this long."""
GRACE_S = 0.3
"""Longer than the 0.1 s between two checks of the deadline by the waiting thread."""
DELIVERY_TIMEOUT_S = 300.0
"""Time-out of `close`."""
SILENCE_S = 10.0
"""Seconds after which `close` logs that it waits."""


@dataclass(frozen=True)
class Delivery:
    """The outcome of tracking."""

    run_id: str | None
    experiment_id: str | None
    undelivered: int
    """Lower bound on the number of records that are still in the run's storage."""
    ended: bool
    """Whether MLflow has the final status of the run."""


class Uploader:
    """Delivers a run's segments while it trains, in a background thread. No method raises; only `close` waits.

    `begin` or `close` starts the thread, which imports MLflow; that takes seconds.

    Args:
        params: the flat config; logged once.
        buffer: the run's folder of segments.
    """

    def __init__(self, address: Address, params: Mapping[str, Any], buffer: Location) -> None:
        self._uri, self._buffer = without_password(address.uri), buffer
        self._run = MlflowRun(address, params)
        self._deliverer = Deliverer(self._run, buffer)
        self._committed, self._ended = -1, False
        self._status: str | None = "FINISHED"
        self._announced = 0
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="ddpm-mlflow", daemon=True)

    def begin(self) -> None:
        """Start the thread, which finds or creates the MLflow run."""
        if self._thread.ident is None:
            self._thread.start()

    def committed(self, images_seen: int) -> None:
        """Announce that the newest checkpoint is at `images_seen`; -1: there is none."""
        self._announced += images_seen > self._committed
        self._committed = images_seen
        self._wake.set()

    @property
    def waiting(self) -> int:
        """Approximate number of undelivered segments: those found last, and those announced since."""
        return self._deliverer.waiting + self._announced

    def close(
        self, status: str | None, timeout_s: float = DELIVERY_TIMEOUT_S, patience_s: float = 30.0
    ) -> Delivery:
        """Deliver the rest, and end the MLflow run with `status` (None: it has not ended). `jobs/sync.py` delivers
        what is left.

        Args:
            timeout_s: seconds after which it gives up; if fewer than MIN_BEGIN_S, a delivery that has not begun is not
                started.
            patience_s: seconds without a successful call after which it gives up.
        """
        self._status = status
        self._run.call.limit(timeout_s, patience_s)
        self._closing.set()
        self._wake.set()
        if timeout_s >= MIN_BEGIN_S:
            self.begin()
        if self._thread.ident is not None:
            self._wait()
        left = _count_in_time(self._buffer, self._committed, min(timeout_s, COUNT_TIMEOUT_S))
        last_error = self._run.call.last_error
        if left:
            line = f"MLflow at {self._uri} did not accept everything ({left} records left)"
            logger.warning("%s", f"{line}: {last_error}" if last_error else line)
        elif last_error and not self._ended:
            logger.warning("MLflow at %s does not know how the run ended: %s", self._uri, last_error)
        return Delivery(self._run.run_id, self._run.experiment_id, left, self._ended)

    def _wait(self) -> None:
        """Wait until the thread ends, or its time is up."""
        announced, begun = False, time.monotonic()
        while self._thread.is_alive() and not self._run.call.is_out_of_time:
            self._thread.join(0.1)
            if not announced and time.monotonic() > begun + SILENCE_S:
                announced = True
                logger.warning("waiting for MLflow at %s to accept the rest", self._uri)
        self._thread.join(GRACE_S)

    def _work(self) -> None:
        try:
            self._run.open(running=True)
            while not self._round():
                self._wake.wait(IDLE_S)
            self._ended = self._status is None or self._run.end(self._status)
        except OutOfTime:
            pass  # `close` reports it
        except Exception as error:
            why = str(error) if isinstance(error, Lost) else reason(error, self._uri)
            kept = f"records are kept in {self._buffer.uri}"
            logger.error("tracking has stopped, training continues, %s: %s", kept, why)

    def _round(self) -> bool:
        """Deliver once; returns whether this was the last time."""
        self._announced = 0
        self._wake.clear()  # first, so that a checkpoint announced from now on causes another round
        closing = self._closing.is_set()
        try:
            self._deliverer.deliver(self._committed, everything=closing)
            return closing
        except OSError as error:
            logger.info("storage does not answer, tracking waits: %s", error)
            if closing:
                self._run.call.check_time()
                time.sleep(1)
                self._wake.set()
            return False


class Deliverer:
    """Delivers final segments from a folder to an MLflow run, oldest first.

    Args:
        show: called with the number of records delivered so far.
    """

    def __init__(
        self, run: MlflowRun, buffer: Location, show: Callable[[int], None] = lambda num_records: None
    ) -> None:
        self._run, self._buffer, self._show = run, buffer, show
        self._delivered = self.waiting = 0
        """Segments that were found and are not delivered."""
        self._postponed: dict[str, float] = {}
        """Segments that MLflow did not take or that are damaged, and when to try again."""

    def deliver(self, committed: int, everything: bool) -> None:
        """Deliver final segments; `everything`: also those put aside.

        Raises:
            OSError: storage does not answer.
            OutOfTime, Lost: as MlflowRun.send.
        """
        segments = spool.final(self._buffer, committed)
        self.waiting = len(segments)
        for file in segments:
            if everything or time.monotonic() >= self._postponed.get(file.uri, -math.inf):
                self._deliver_one(file)

    def _deliver_one(self, file: Location) -> None:
        try:
            records = metrics_buffer.read(file.read(metrics_buffer.MAX_SEGMENT_BYTES), file.uri)
        except FileNotFoundError:  # another process delivered it
            return
        except UserError as error:
            self._postpone(file, f"{error}; it stays where it is")
            return
        if not self._run.send(records):
            why = f"which is kept for later: {self._run.call.last_error}"
            self._postpone(file, f"MLflow does not accept all of {file.uri}, {why}")
            return
        self._postponed.pop(file.uri, None)
        file.unlink()
        self.waiting -= 1
        self._delivered += len(records)
        self._show(self._delivered)

    def _postpone(self, file: Location, why: str) -> None:
        if file.uri not in self._postponed:
            logger.warning("%s", why)
        self._postponed[file.uri] = time.monotonic() + POSTPONE_S


def _count_in_time(buffer: Location, committed: int, timeout_s: float) -> int:
    """`spool.count` with a time-out; 1 if storage does not answer."""
    counted = [1]

    def count() -> None:
        try:
            counted.append(spool.count(buffer, committed))
        except OSError as error:
            logger.info("storage does not answer, the number of records left is unknown: %s", error)

    thread = threading.Thread(target=count, name="ddpm-mlflow-count", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return counted[-1]
