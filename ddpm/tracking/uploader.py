"""From a run's storage to MLflow: segments of what was tracked are delivered once they are final, then deleted.

MLflow may be away for as long as it likes: nothing is lost, training notices nothing, and what the run could
not deliver before it ended `jobs/track.py` delivers later.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ddpm import config as configs
from ddpm.checkpoints import checkpoint, runs
from ddpm.checkpoints.runs import Run
from ddpm.storage.locations import Location
from ddpm.tracking import metrics_buffer, spool
from ddpm.tracking.metrics_buffer import DamagedSegment
from ddpm.tracking.mlflow_runs import Address, Lost, MlflowRun, tracking_uri, without_password
from ddpm.tracking.retry import OutOfTime
from ddpm.utils.errors import UserError

logger = logging.getLogger(__name__)

IDLE_S = 30.0
"""A segment may appear that nobody announced: last words."""
ASIDE_S = 300.0
"""After so long, what MLflow did not take is tried again; and when the run ends."""
COUNT_TIMEOUT_S = 10.0
MIN_BEGIN_S = 5.0
"""With less time than that, MLflow would not even be imported."""
GRACE_S = 0.3
"""The thread looks for its deadline ten times a second, while it waits."""


class NotDelivered(UserError):
    """Something is still in the run's storage."""

    exit_code = 1


@dataclass(frozen=True)
class Delivery:
    """How tracking ended."""

    run_id: str | None
    experiment_id: str | None
    undelivered: int
    """Records that are still in the run's storage, at least."""
    ended: bool
    """Whether MLflow knows how the run ended."""


class Uploader:
    """Delivers a run's segments while it trains, from a thread of its own. No method raises; only `close` waits.

    Args:
        address: of the run.
        params: the flat config; logged once.
        buffer: the run's folder of segments.
        at_once: if not, it waits for `begin`, or `close`: MLflow takes seconds to import.
    """

    def __init__(
        self, address: Address, params: Mapping[str, Any], buffer: Location, at_once: bool = True
    ) -> None:
        self._uri, self._buffer = without_password(address.uri), buffer
        self._run = MlflowRun(address, params)
        self._carrier = _Carrier(self._run, buffer)
        self._committed, self._status, self._ended = -1, "FINISHED", False
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="ddpm-mlflow", daemon=True)
        self._begun = False
        if at_once:
            self.begin()

    def begin(self) -> None:
        """Look for the MLflow run, or make one."""
        if not self._begun:
            self._begun = True
            self._thread.start()

    def committed(self, images_seen: int) -> None:
        """The newest checkpoint is the one after `images_seen` images; -1: there is none."""
        self._committed = images_seen
        self._wake.set()

    def close(self, status: str, timeout_s: float = 60.0) -> Delivery:
        """Deliver the rest, for about `timeout_s` at most, and end the MLflow run: FINISHED, FAILED or KILLED.

        A delivery that has not begun by then does not begin when there is less time than MIN_BEGIN_S.
        """
        self._status, self._run.call.deadline = status, time.monotonic() + timeout_s
        self._closing.set()
        self._wake.set()
        if timeout_s >= MIN_BEGIN_S:
            self.begin()
        if self._begun:
            self._thread.join(timeout_s + GRACE_S)
        left = _count_in_time(self._buffer, self._committed, min(timeout_s, COUNT_TIMEOUT_S))
        trouble = self._run.call.trouble
        if left:
            reason = f": {trouble}" if trouble else ""
            logger.warning(
                "MLflow at %s did not take everything (%d records left)%s", self._uri, left, reason
            )
        elif trouble and not self._ended:
            logger.warning("MLflow at %s has not been told how the run ended: %s", self._uri, trouble)
        return Delivery(self._run.run_id, self._run.experiment_id, left, self._ended)

    def _work(self) -> None:
        try:
            self._run.open(running=True)
            while not self._round():
                self._wake.wait(IDLE_S)
            self._ended = self._run.end(self._status)
        except OutOfTime:
            pass  # close says so
        except Exception as error:
            why = str(error) if isinstance(error, Lost) else self._run.call.reason(error)
            kept = f"what is tracked stays in {self._buffer.uri}"
            logger.error("tracking stopped, training goes on, %s: %s", kept, why)

    def _round(self) -> bool:
        """Whether this was the last one."""
        self._wake.clear()  # first: what is announced from now on gets a round of its own
        closing = self._closing.is_set()
        try:
            self._carrier.carry(self._committed, everything=closing)
            return closing
        except OSError as error:
            logger.info("storage does not answer, tracking waits for it: %s", error)
            if closing:
                self._run.call.check_time()
                time.sleep(1)
                self._wake.set()
            return False


class _Carrier:
    """Carries final segments from an buffer to an MLflow run, oldest first."""

    def __init__(self, run: MlflowRun, buffer: Location) -> None:
        self._run, self._buffer = run, buffer
        self._aside: dict[str, float] = {}
        """Segments that MLflow did not take, or that are damaged, and when to try again."""

    def carry(
        self, committed: int, everything: bool, show: Callable[[int], None] = lambda num_records: None
    ) -> None:
        """Deliver what is final and due; `everything`: also what was put aside. `show` is told of each delivery.

        Raises:
            OSError: storage does not answer.
            OutOfTime, Lost: as MlflowRun.send.
        """
        for file in spool.final(self._buffer, committed):
            if everything or time.monotonic() >= self._aside.get(file.uri, -math.inf):
                show(self._carry_one(file))

    def _carry_one(self, file: Location) -> int:
        """How many records were delivered."""
        try:
            gathered = metrics_buffer.read(file.read(), file.uri)
        except FileNotFoundError:  # somebody else delivered it
            return 0
        except DamagedSegment as error:
            self._put_aside(file, f"{error}; it is left where it is")
            return 0
        if not self._run.send(gathered):
            trouble = self._run.call.trouble
            self._put_aside(
                file, f"MLflow does not take all of {file.uri}, which is kept for later: {trouble}"
            )
            return 0
        self._aside.pop(file.uri, None)
        spool.delete(file)
        return len(gathered)

    def _put_aside(self, file: Location, why: str) -> None:
        if file.uri not in self._aside:
            logger.warning("%s", why)
        self._aside[file.uri] = time.monotonic() + ASIDE_S


@dataclass(frozen=True)
class Kept:
    """What a run still has to tell MLflow."""

    address: Address
    params: Mapping[str, Any]
    buffer: Location
    committed: int
    """images_seen of the newest checkpoint; -1: there is none."""
    finished: bool
    """That checkpoint is the end of the run."""
    records: int


def kept(uri: str, experiment: str | None = None) -> Kept:
    """What the run in the folder or bucket `uri` has kept.

    Args:
        experiment: of a run that has no checkpoint, which would say so.

    Raises:
        UserError: no run, or storage refuses.
    """
    run = runs.existing_run(uri)
    try:
        return _kept(run, experiment)
    except OSError as error:
        raise UserError(f"{run.location.uri} cannot be read: {error}") from None


def _kept(run: Run, experiment: str | None) -> Kept:
    params: dict[str, Any] = {}
    committed, finished = -1, False
    if found := runs.checkpoints(run.location):
        card = found[-1].child("config.json")
        config = configs.from_json(card.read().decode(errors="replace"), card.uri)
        committed = int(found[-1].path.rpartition(checkpoint.PREFIX)[2])
        finished, experiment = committed >= config.train.total_images, config.run.experiment
        params = configs.flatten(config)
    elif experiment is None:
        raise UserError(
            f"{run.location.uri} has no checkpoint, which would tell the experiment; name it with --experiment "
            f"(of training, --run.experiment; if that was not given, {configs.RunConfig.experiment})"
        )
    address = Address(tracking_uri(), experiment, run.name, run.key)
    buffer = run.location.child(spool.FOLDER)
    return Kept(address, params, buffer, committed, finished, spool.count(buffer, committed))


def deliver(kept: Kept, timeout_s: float, show: Callable[[int], None]) -> Delivery:
    """Deliver what a run has kept; the status of its MLflow run is changed only if the run is finished.

    Args:
        timeout_s: of no progress, after which it gives up.
        show: told how many records were delivered so far.

    Raises:
        NotDelivered: MLflow or storage does not answer, refuses the run, or did not take everything.
    """
    uri, run, done = without_password(kept.address.uri), MlflowRun(kept.address, kept.params, timeout_s), 0

    def add(num_records: int) -> None:
        nonlocal done
        done += num_records
        show(done)

    try:
        run.open(running=False)
        _Carrier(run, kept.buffer).carry(kept.committed, everything=True, show=add)
        ended = kept.finished and run.end("FINISHED")
        left = spool.count(kept.buffer, kept.committed)
    except OutOfTime:
        why = f"nothing worked for {timeout_s:g} s; {run.call.trouble}"
        raise NotDelivered(f"MLflow at {uri} cannot be reached, all is kept: {why}") from None
    except Lost as error:
        raise NotDelivered(f"MLflow at {uri} refuses the run: {error}") from None
    except OSError as error:
        raise NotDelivered(f"{kept.buffer.uri} cannot be read: {error}") from None
    if left:
        raise NotDelivered(
            f"MLflow at {uri} did not take everything: {left} records are kept in {kept.buffer.uri}"
        )
    return Delivery(run.run_id, run.experiment_id, left, ended)


def _count_in_time(buffer: Location, committed: int, timeout_s: float) -> int:
    """As `segments.count`, of a storage that may not answer: what is not known counts as one."""
    counted = [1]

    def count() -> None:
        try:
            counted.append(spool.count(buffer, committed))
        except OSError as error:
            logger.info("storage does not answer, it is not known what is left: %s", error)

    thread = threading.Thread(target=count, name="ddpm-mlflow-count", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return counted[-1]
