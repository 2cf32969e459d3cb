"""Retries of calls to an MLflow server that may be unavailable, hang, or refuse a record, until time is up."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from ddpm.tracking.mlflow_client import Lost, reason, without_password

logger = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
ATTEMPTS = 4
"""Largest number of failures of a call at a server that otherwise answers."""
REFUSED = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for a record that it will never accept."""
PERMANENT = (*REFUSED, "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "UNAUTHENTICATED")
"""MLflow's codes for a call that is useless to repeat."""


class OutOfTime(Exception):
    """The deadline passed with work left; the message is the last failure's."""


class Failed(Exception):
    """A call did not succeed; the message gives the reason in one line, without a password."""


class Refused(Failed):
    """MLflow will never accept a record."""


class Caller:
    """Makes calls for one thread; another thread may set the limits.

    Args:
        uri: MLflow's URI; a password in it is never shown.
        answers: whether the server answers a simple query.
        patience_s: seconds without a successful call after which time is up.
    """

    def __init__(self, uri: str, answers: Callable[[], bool], patience_s: float = math.inf) -> None:
        self.last_error = ""
        """The last failure."""
        self._uri, self._answers = uri, answers
        self.limit(math.inf, patience_s)
        self._warned = False

    def limit(self, timeout_s: float, patience_s: float) -> None:
        """Set when time is up: `timeout_s` from now, or after `patience_s` without a successful call."""
        self._worked_at = time.monotonic()
        self._deadline, self._patience_s = self._worked_at + timeout_s, patience_s

    @property
    def is_out_of_time(self) -> bool:
        return time.monotonic() > min(self._deadline, self._worked_at + self._patience_s)

    def check_time(self) -> None:
        """Raise OutOfTime if time is up."""
        if self.is_out_of_time:
            raise OutOfTime(self.last_error)

    def __call__(self, call: Callable[..., Any], *args: Any, attempts: float = ATTEMPTS) -> Any:
        """Retry call(*args) until it works, is useless to repeat, or failed `attempts` times at a server that answers.

        Raises:
            OutOfTime: time is up.
            Failed: the last attempt failed; Refused if the call will never work.
            Lost: `call` raised it.
        """
        self.check_time()
        failed, wait_s = 0, FIRST_WAIT_S
        while True:
            try:
                result = call(*args)
                break
            except (OutOfTime, Lost, Refused):
                raise
            except Exception as error:
                self.last_error = reason(error, self._uri)
                if not _is_temporary(error):
                    raise (Refused if _is_refusal(error) else Failed)(self.last_error) from None
            self.check_time()
            failed += attempts == 1 or self._answers()
            if failed >= attempts:
                raise Failed(self.last_error)
            self._warn_once()
            end = time.monotonic() + wait_s
            while time.monotonic() < end:
                self.check_time()
                time.sleep(0.1)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        self._worked_at, self._warned = time.monotonic(), False
        return result

    def _warn_once(self) -> None:
        """Warn once per outage."""
        if not self._warned:
            uri = without_password(self._uri)
            logger.warning("MLflow at %s is not accepting data (%s); retrying", uri, self.last_error)
        self._warned = True


def _is_temporary(error: BaseException) -> bool:
    if (code := getattr(error, "error_code", None)) is not None:  # an MlflowException
        return code not in PERMANENT
    status = _http_status(error, otherwise=500)
    return isinstance(error, OSError) and (status >= 500 or status in (408, 429))


def _is_refusal(error: BaseException) -> bool:
    return getattr(error, "error_code", None) in REFUSED or _http_status(error, otherwise=0) == 400


def _http_status(error: BaseException, otherwise: int) -> int:
    """The HTTP status in the error of a file transfer (an OSError of requests holds the response)."""
    return getattr(getattr(error, "response", None), "status_code", otherwise)
