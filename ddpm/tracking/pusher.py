"""Pushes of a run while it trains, in a background thread of its driver: training neither waits for MLflow nor slows.

MLflow may be unreachable for any time. What it lacks stays in the run's folder, and the next push sends it.
"""

import logging
import threading
import time
from dataclasses import dataclass

from ddpm.runs.run_folder import RunFolder
from ddpm.tracking.mlflow_client import MlflowError, tracking_uri, without_password
from ddpm.tracking.push import Pushed, push
from ddpm.utils.errors import UserError

log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5
"""Wait after a push that failed; it doubles with each failure."""
LONGEST_WAIT_S = 10.0
PATIENCE_S = 30.0
"""The end of a run waits for MLflow until it has accepted nothing for so long."""
MIN_BEGIN_S = 5.0
"""Importing MLflow takes about this long."""
GRACE_S = 0.3
SILENCE_S = 10.0
"""Seconds after which `close` logs that it waits."""


@dataclass(frozen=True)
class Delivery:
    """The state of MLflow at the end of a run."""

    pushed: Pushed | None
    """The last push that succeeded."""
    is_complete: bool
    """Whether MLflow has everything."""


class Pusher:
    """Pushes a run after each checkpoint. No method raises; only `close` waits.

    MLflow takes seconds to import, so nothing happens before `begin` or `close`.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._uri = without_password(tracking_uri())
        self._pushed: Pushed | None = None
        self._is_complete = False
        self._has_warned = False
        self._announced = 0
        """Number of checkpoints announced."""
        self._covered = 0
        """Number of those that the last successful push has sent."""
        self._accepted_at = time.monotonic()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ddpm-mlflow", daemon=True)

    def begin(self) -> None:
        """Start the thread, and push at once."""
        if self._thread.ident is None:
            self._thread.start()

    def notify(self) -> None:
        """Push soon: there is a new checkpoint."""
        self._announced += 1
        self._wake.set()

    @property
    def waiting(self) -> int | None:
        """Number of checkpoints announced since the last push that succeeded; None: nothing is sent."""
        return self._announced - self._covered

    def close(self, patience_s: float = PATIENCE_S) -> Delivery | None:
        """Push everything, the run's status included; `ddpm sync` sends later what is left.

        Args:
            patience_s: give up after so many seconds in which MLflow accepted nothing; if fewer than MIN_BEGIN_S, the
                thread is not started for that.
        """
        self._accepted_at = time.monotonic()
        self._closing.set()
        self._wake.set()
        if patience_s >= MIN_BEGIN_S:
            self.begin()
        if self._thread.ident is not None:
            self._wait(patience_s)
        return Delivery(self._pushed, self._is_complete)

    def _wait(self, patience_s: float) -> None:
        """Wait until the thread ends, or MLflow has accepted nothing for `patience_s`."""
        has_warned = False
        began = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - self._accepted_at < patience_s:
            self._thread.join(0.1)
            if not has_warned and time.monotonic() - began > SILENCE_S:
                has_warned = True
                log.warning("waiting for MLflow at %s to accept the rest", self._uri)
        self._thread.join(GRACE_S)

    # The methods below run in the thread.

    def _work(self) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            self._wake.clear()
            closing = self._closing.is_set()
            announced = self._announced
            error = self._push()
            if error is None:
                self._covered = announced
                self._is_complete = closing
                wait_s = FIRST_WAIT_S
            if closing and (error is None or not _is_temporary(error)):
                return
            if error is None:
                self._wake.wait()
            elif closing:
                time.sleep(FIRST_WAIT_S)
            else:
                self._closing.wait(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _push(self) -> Exception | None:
        """Push once; returns the error if that failed. The first failure of an outage is a warning."""
        try:
            self._pushed = push(self._run, accepted=self._accept, warn=log.warning)
        except Exception as error:  # of any type: training does not depend on it
            if not self._has_warned:
                self._has_warned = True
                self._warn(error)
            return error
        self._has_warned = False
        return None

    def _warn(self, error: Exception) -> None:
        if isinstance(error, UserError) and not isinstance(error, MlflowError):
            log.warning("the run is sent to MLflow at %s later: %s", self._uri, error)
            return
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        log.warning("MLflow at %s does not accept data, which is sent later: %s", self._uri, line)

    def _accept(self) -> None:
        self._accepted_at = time.monotonic()


class NoPusher(Pusher):
    """The pusher of a run with run.tracking none: it sends nothing, and imports no MLflow."""

    waiting = None

    def begin(self) -> None:
        pass

    def notify(self) -> None:
        pass

    def close(self, patience_s: float = PATIENCE_S) -> None:
        pass


def push_patiently(run: RunFolder, timeout_s: float) -> Pushed:
    """Repeat `push` until it succeeds, or MLflow has accepted nothing for `timeout_s`.

    Raises:
        MlflowError: that time is over, or trying again is useless.
    """
    accepted_at = time.monotonic()

    def accept() -> None:
        nonlocal accepted_at
        accepted_at = time.monotonic()

    while True:
        try:
            return push(run, accepted=accept)
        except MlflowError as error:
            if not error.is_temporary or time.monotonic() - accepted_at > timeout_s:
                uri = without_password(tracking_uri())
                raise MlflowError(
                    f"MLflow at {uri} does not accept {run.name}, whose folder keeps everything: {error}"
                ) from None
        time.sleep(FIRST_WAIT_S)


def _is_temporary(error: Exception) -> bool:
    """Whether the same push may succeed soon. A folder that cannot be read is not MLflow's absence."""
    if isinstance(error, MlflowError):
        return error.is_temporary
    return not isinstance(error, UserError)
