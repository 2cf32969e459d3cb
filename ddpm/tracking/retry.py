"""Retries of calls to an MLflow server that may be unavailable, hang, or refuse a record, until time is up."""

import logging
import math
import re
import time
from collections.abc import Callable
from typing import Any

import tenacity

logger = logging.getLogger(__name__)

ATTEMPTS = 4
"""Largest number of failures of a call at a server that otherwise answers."""
REFUSED = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for a record that it will never accept."""
PERMANENT = (*REFUSED, "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "UNAUTHENTICATED")
"""MLflow's codes for a call that is useless to repeat."""
USER_INFO = re.compile(r"//[^/\s@]*@")


class OutOfTime(Exception):
    """The deadline passed with work left."""


class Refused(ValueError):
    """A record that MLflow will never accept."""


class Caller:
    """Makes calls for one thread; another thread may set the limits.

    Args:
        uri: MLflow's URI; a password in it is never shown.
        answers: whether the server answers a simple query.
        patience_s: seconds without a successful call after which time is up.
    """

    def __init__(self, uri: str, answers: Callable[[], bool], patience_s: float = math.inf) -> None:
        self.trouble = ""
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
            raise OutOfTime

    def __call__(self, call: Callable[..., Any], *args: Any, attempts: int = ATTEMPTS) -> Any:
        """Retry call(*args) until it works, is useless to repeat, or failed `attempts` times at a server that answers.

        Raises:
            OutOfTime: time is up.
            Exception: what the last attempt raised.
        """
        self.check_time()
        failed = 0

        def should_stop(_: tenacity.RetryCallState) -> bool:
            nonlocal failed
            self.check_time()
            failed += attempts == 1 or self._answers()
            return failed >= attempts

        retrying = tenacity.Retrying(
            stop=should_stop,
            wait=tenacity.wait_exponential(multiplier=0.5, max=10),
            sleep=self._sleep,
            retry=tenacity.retry_if_exception(_is_temporary),
            before_sleep=self._warn_once,
            reraise=True,
        )
        result = retrying(call, *args)
        self._worked_at, self._warned = time.monotonic(), False
        return result

    def takes(self, call: Callable[..., Any], *args: Any, attempts: int = ATTEMPTS) -> bool:
        """Whether call(*args) works in the end; if not, `trouble` gives the reason.

        Raises:
            OutOfTime: time is up.
            Refused: it will never work; the message gives the reason.
        """
        try:
            self(call, *args, attempts=attempts)
        except OutOfTime:
            raise
        except Exception as error:
            self.trouble = self.reason(error)
            if _is_refusal(error):
                raise Refused(self.trouble) from None
            return False
        return True

    def reason(self, error: BaseException | None) -> str:
        """`error` in one line, without the password that MLflow's messages quote with the URI."""
        text = str(error).replace(self._uri, without_password(self._uri))
        return f"{type(error).__name__}: {USER_INFO.sub('//', ' '.join(text.split()))[:400]}"

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.check_time()
            time.sleep(0.1)

    def _warn_once(self, state: tenacity.RetryCallState) -> None:
        """Warn once per outage."""
        assert state.outcome is not None
        self.trouble = self.reason(state.outcome.exception())
        if not self._warned:
            uri = without_password(self._uri)
            logger.warning("MLflow at %s is not accepting data (%s); retrying", uri, self.trouble)
        self._warned = True


def without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if separator else uri


def _is_temporary(error: BaseException) -> bool:
    if (code := getattr(error, "error_code", None)) is not None:  # an MlflowException
        return code not in PERMANENT
    status = _http_status(error, otherwise=500)
    return isinstance(error, OSError) and (status >= 500 or status in (408, 429))


def _is_refusal(error: BaseException) -> bool:
    code = getattr(error, "error_code", None)
    return isinstance(error, Refused) or code in REFUSED or _http_status(error, otherwise=0) == 400


def _http_status(error: BaseException, otherwise: int) -> int:
    """The HTTP status in the error of a file transfer (an OSError of requests holds the response)."""
    return getattr(getattr(error, "response", None), "status_code", otherwise)
