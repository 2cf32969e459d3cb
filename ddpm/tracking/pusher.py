"""Pushes of runs while they train, in a background thread of their driver: training neither waits for MLflow nor slows.

MLflow may be unreachable for any time, and may refuse a run. What it lacks stays in the runs' folders, and a later push
sends it.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

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
    """The state of MLflow at the end."""

    pushed: Pushed | None
    """The last successful push of the first run."""
    is_complete: bool
    """Whether MLflow has everything of every run."""
    error: str = field(default="", compare=False)
    """The last reason why it has not, if there was an answer."""


@dataclass
class _Tracked:
    """A run, and how much of its news was sent, counted."""

    name: str
    call: Callable[..., Pushed]
    """Pushes it."""
    announced: int = 0
    sent: int = -1
    """`announced` at the last successful push."""
    refused: int = -1
    """`announced` at the last push that was useless to repeat."""
    last: Pushed | None = None
    has_warned: bool = False

    @property
    def is_due(self) -> bool:
        return max(self.sent, self.refused) < self.announced


class Pusher:
    """Pushes runs when there is news of them. No method raises; only `close` waits.

    In a pass each run with news is pushed once, in the order in which they were added. One that MLflow refuses is left
    until there is more news of it; the others go on.

    MLflow takes seconds to import, so nothing happens before `begin` or `close`.

    Args:
        run: the first run; None: `add` and `add_run` name them.
    """

    def __init__(self, run: RunFolder | None = None) -> None:
        self._uri = without_password(tracking_uri())
        self._runs: dict[str, _Tracked] = {}
        self._has_warned = False
        self._error = ""
        self._accepted_at = time.monotonic()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._push_until_closed, name="ddpm-mlflow", daemon=True)
        if run is not None:
            self.add_run(run)

    def add_run(self, run: RunFolder) -> None:
        """Push a run soon, and again when there is news of it."""
        self.add(run.name, partial(push, run))

    def add(self, name: str, call: Callable[..., Pushed]) -> None:
        """Call `call` soon, with the arguments `accepted` and `warn` of `push`; again when there is news."""
        if name in self._runs:
            self.notify(name)
        else:
            self._runs[name] = _Tracked(name, call)
            self._wake.set()

    def begin(self) -> None:
        """Start the thread, and push at once."""
        if self._thread.ident is None:
            self._thread.start()

    def notify(self, *names: str) -> None:
        """Push soon: there is news of these runs, such as a checkpoint; without names, of all."""
        for run in [self._runs[name] for name in names] or self._runs.values():
            run.announced += 1
        self._wake.set()

    @property
    def waiting(self) -> int | None:
        """How much news MLflow does not have yet; None: nothing is sent."""
        return sum(run.announced - max(run.sent, 0) for run in self._runs.values())

    @property
    def is_complete(self) -> bool:
        """Whether MLflow has everything that there was news of."""
        return all(run.sent == run.announced for run in list(self._runs.values()))

    def close(self, patience_s: float = PATIENCE_S, *, news_only: bool = False) -> Delivery | None:
        """Push everything, the runs' status included; `ddpm sync` sends later what is left.

        Args:
            patience_s: give up after so many seconds in which MLflow accepted nothing; if fewer than MIN_BEGIN_S, the
                thread is not started for that.
            news_only: push only the runs of which there is news that was not sent.
        """
        if not news_only:
            self.notify()
        self._accepted_at = time.monotonic()
        self._closing.set()
        self._wake.set()
        if patience_s >= MIN_BEGIN_S:
            self.begin()
        if self._thread.ident is not None:
            self._wait(patience_s)
        first = next(iter(self._runs.values()), None)
        return Delivery(first.last if first else None, self.is_complete, self._error)

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

    def _push_until_closed(self) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            self._wake.clear()
            closing = self._closing.is_set()
            has_failed = self._push_due()
            if closing and not has_failed:
                return
            if not has_failed:
                wait_s = FIRST_WAIT_S
                self._wake.wait()
            elif closing:
                time.sleep(FIRST_WAIT_S)
            else:
                self._closing.wait(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _push_due(self) -> bool:
        """Push each run that is due once; returns whether a push failed that may succeed soon.

        The first failure of an outage is a warning.
        """
        errors = list[Exception]()
        for run in list(self._runs.values()):
            error = self._push(run) if run.is_due else None
            if error is not None:
                errors.append(error)
        if errors and not self._has_warned:
            log.warning(
                "MLflow at %s does not accept data, which is sent later: %s", self._uri, _line(errors[0])
            )
        self._has_warned = bool(errors)
        return bool(errors)

    def _push(self, run: _Tracked) -> Exception | None:
        """Push a run; returns the error if the same push may succeed soon. Any other error is a warning, once."""
        announced = run.announced
        try:
            run.last = run.call(accepted=self._accept, warn=log.warning)
        except Exception as error:  # of any type: training does not depend on it
            self._error = _line(error)
            if _is_temporary(error):
                return error
            run.refused = announced
            if not run.has_warned:
                run.has_warned = True
                self._warn(run, error)
            return None
        run.sent = announced
        run.has_warned = False
        return None

    def _warn(self, run: _Tracked, error: Exception) -> None:
        if isinstance(error, MlflowError):
            log.warning("%s", refusal(self._uri, run.name, error))
        else:
            log.warning("%s is sent to MLflow at %s later: %s", run.name, self._uri, error)

    def _accept(self) -> None:
        self._accepted_at = time.monotonic()


class NoPusher(Pusher):
    """The pusher of runs that are not tracked, or that another process pushes; it imports no MLflow."""

    waiting = None

    def begin(self) -> None:
        pass

    def add(self, name: str, call: Callable[..., Pushed]) -> None:
        pass

    def notify(self, *names: str) -> None:
        pass

    def close(self, patience_s: float = PATIENCE_S, *, news_only: bool = False) -> None:
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
                raise MlflowError(refusal(without_password(tracking_uri()), run.name, error)) from None
        time.sleep(FIRST_WAIT_S)


def refusal(uri: str, name: str, error: Exception) -> str:
    """The message that MLflow at `uri` does not accept a run."""
    return f"MLflow at {uri} does not accept {name}, whose folder keeps everything: {error}"


def _line(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _is_temporary(error: Exception) -> bool:
    """Whether the same push may succeed soon; if the run's folder cannot be read, it will not."""
    if isinstance(error, MlflowError):
        return error.is_temporary
    return not isinstance(error, UserError)
