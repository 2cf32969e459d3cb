"""Retries of storage calls, for run.storage_timeout_s at most."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import tenacity

from ddpm.utils.errors import UserError

T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
MAX_ANSWER = 400
"""Characters of the last answer that an error shows."""
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_LOOKS_SECRET = r"(?:AKIA|ASIA)[A-Z0-9]{16}|(?<=://)[^/@\s]+(?=@)|(?<=X-Amz-Signature=)\w+|(?<=Signature=)\w+"


class StorageError(UserError):
    """Storage failed, or did not answer, for longer than run.storage_timeout_s."""

    exit_code = 1


def retry_io(call: Callable[[], T], *, where: str, timeout_s: float) -> T:
    """Return the result of `call`; retry while it raises OSError.

    The wait between tries is random and grows from 0.2 s to at most 10 s, so that many workers do not retry at
    once. The last try begins at the time-out; a running try is not interrupted.

    Args:
        call: safe to repeat.
        where: the bucket or folder, for the error: "s3://bucket/runs".
        timeout_s: seconds after which no new try begins; 0: one try.

    Raises:
        StorageError: the time-out has passed; the message has the time tried and the last answer.
        FileNotFoundError: at once, since a retry would not change it.
    """
    backoff = tenacity.wait_random_exponential(
        multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S, min=FIRST_WAIT_S / 2
    )

    def wait(state: tenacity.RetryCallState) -> float:
        return max(0.0, min(backoff(state), timeout_s - (state.seconds_since_start or 0.0)))

    began, not_missing = time.monotonic(), tenacity.retry_if_not_exception_type(FileNotFoundError)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(OSError) & not_missing,
        wait=wait,
        stop=tenacity.stop_after_delay(timeout_s),
        reraise=True,
    )
    try:
        return retrying(call)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"{where}: storage has failed for {time.monotonic() - began:.0f} s (--run.storage-timeout-s "
            f"{timeout_s:g}); its last answer: {answer(error)}"
        ) from None


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """A context that turns an OSError of storage into a one-line UserError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {answer(error)}") from None


def answer(error: BaseException) -> str:
    """The error message of storage: one line, of bounded length, without credentials."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        error = OSError(error.args[0][0][-1])  # (source, destination, reason) of each file not copied
    text = " ".join(str(error).split()) or type(error).__name__
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    text = re.sub(_LOOKS_SECRET, "***", text)
    return text if len(text) <= MAX_ANSWER else f"{text[:MAX_ANSWER]}..."
