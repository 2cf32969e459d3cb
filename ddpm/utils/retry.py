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

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
WARN_AFTER_S = 2.0
"""Seconds of failed tries after which `warn` is called; until then no wait is longer."""
MAX_ERROR = 400
"""Characters of an error of storage that a message shows."""
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_LOOKS_SECRET = r"(?:AKIA|ASIA)[A-Z0-9]{16}|(?<=://)[^/@\s]+(?=@)|(?<=X-Amz-Signature=)\w+|(?<=Signature=)\w+"


class StorageError(UserError):
    """Storage failed, or did not answer, for longer than run.storage_timeout_s."""

    exit_code = 1


def retry_io(
    call: Callable[[], T], *, where: str, timeout_s: float, warn: Callable[[str], object] = lambda line: None
) -> T:
    """Return the result of `call`, which is safe to repeat; retry while it raises OSError.

    FileNotFoundError is raised at once, since a retry would not change it. The wait between tries is random and grows
    from 0.2 s to at most 10 s, so that many workers do not retry at once. A running try is not interrupted.

    Args:
        where: the bucket or folder, for the error: "s3://bucket/runs".
        timeout_s: when the last try begins; 0: one try.
        warn: called once with a line when tries have failed for WARN_AFTER_S to twice as long.

    Raises:
        StorageError: the time-out has passed; the message has the time tried and the last answer.
    """
    backoff = tenacity.wait_random_exponential(
        multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S, min=FIRST_WAIT_S / 2
    )

    def wait(state: tenacity.RetryCallState) -> float:
        longest = LONGEST_WAIT_S if has_warned else WARN_AFTER_S
        return max(0.0, min(backoff(state), longest, timeout_s - (state.seconds_since_start or 0.0)))

    has_warned = False

    def before_sleep(state: tenacity.RetryCallState) -> None:
        nonlocal has_warned
        if not has_warned and (state.seconds_since_start or 0.0) > WARN_AFTER_S and state.outcome:
            has_warned = True
            warn(f"{where}: {error_line(state.outcome.exception())}; trying again for up to {timeout_s:g} s")

    began = time.monotonic()
    not_missing = tenacity.retry_if_not_exception_type(FileNotFoundError)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(OSError) & not_missing,
        wait=wait,
        stop=tenacity.stop_after_delay(timeout_s),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        return retrying(call)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"{where}: storage has failed for {time.monotonic() - began:.0f} s (--run.storage-timeout-s "
            f"{timeout_s:g}); its last answer: {error_line(error)}"
        ) from None


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """A context that turns an OSError of storage into a one-line UserError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error_line(error)}") from None


def error_line(error: BaseException | None) -> str:
    """The error message of storage: one line, of bounded length, without credentials."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        _, _, reason = error.args[0][0]  # source and destination of the first file that was not copied
        error = OSError(reason)
    text = " ".join(str(error).split()) or type(error).__name__
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    text = re.sub(_LOOKS_SECRET, "***", text)
    return text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}..."
