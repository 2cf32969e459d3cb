"""Failing calls are retried until they succeed or time is over; an answer is final."""

import re
import shutil
import time
from pathlib import Path

import pytest

from ddpm.utils import retry
from ddpm.utils.errors import UserError
from ddpm.utils.retry import MAX_ERROR, StorageError, error_line, retry_io


class FlakyCall:
    """A call that raises `error` the first `times` times."""

    def __init__(self, times: float, error: Exception) -> None:
        self.times = times
        self.error = error
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.calls


def test_a_permanent_failure_is_a_one_line_error() -> None:
    call = FlakyCall(float("inf"), OSError("AWS Error SLOW_DOWN:\n  reduce your\trate"))
    with pytest.raises(StorageError) as caught:
        retry_io(call, where="s3://bucket/runs", timeout_s=0.5)
    expected = (
        r"s3://bucket/runs: storage has failed for \d+ s \(--run\.storage-timeout-s 0\.5\); its last answer: "
        r"AWS Error SLOW_DOWN: reduce your rate"
    )
    assert re.fullmatch(expected, str(caught.value))
    assert caught.value.exit_code == 1 and isinstance(caught.value, UserError)
    assert call.calls >= 2


@pytest.mark.lowest
def test_it_retries_until_the_call_succeeds_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "disk: full; trying again for up to 600 s"
    for times, warn_after_s, expected in ((1, 300.0, []), (4, 0.3, [line])):
        monkeypatch.setattr(retry, "WARN_AFTER_S", warn_after_s)
        lines: list[str] = []
        call = FlakyCall(times, OSError("full"))
        assert retry_io(call, where="disk", timeout_s=600, warn=lines.append) == times + 1
        assert lines == expected


def test_the_last_attempt_is_at_the_time_out() -> None:
    """Whatever the back-off: storage that recovers just before the time-out is still found."""
    for timeout_s in (0, 1.5):
        began = time.monotonic()
        tries = list[float]()

        def call(began: float = began, tries: list[float] = tries) -> None:
            tries.append(time.monotonic() - began)
            raise OSError("no")

        with pytest.raises(StorageError, match="no"):
            retry_io(call, where="disk", timeout_s=timeout_s)
        assert tries[-1] >= timeout_s and (timeout_s or len(tries) == 1)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), ValueError("x"), UserError("x"), KeyboardInterrupt()]
)
def test_permanent_errors_are_not_retried(error: Exception) -> None:
    call = FlakyCall(1, error)
    with pytest.raises(type(error)) as caught:
        retry_io(call, where="disk", timeout_s=60)
    assert caught.value is error and call.calls == 1


def test_credentials_are_not_in_the_error_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret+key/1")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "")
    text = (
        "denied AKIAABCDEFGHIJKLMNOP (topsecret+key/1) at https://me:pass@host/b?X-Amz-Signature=0a1b "
        "for arn:aws:iam::123:user/me"
    )
    assert error_line(OSError(text)) == (
        "denied *** (***) at https://***@host/b?X-Amz-Signature=*** for arn:aws:iam::123:user/me"
    )
    assert error_line(OSError()) == "OSError"
    assert len(error_line(OSError("x" * 10_000))) == MAX_ERROR + 3


def test_an_error_of_shutil_is_one_line(tmp_path: Path) -> None:
    """shutil raises a list of lists."""
    (tmp_path / "from").mkdir()
    for name in ("a", "b"):
        (tmp_path / "from" / name).symlink_to("nothing")
    with pytest.raises(shutil.Error) as raised:
        shutil.copytree(tmp_path / "from", tmp_path / "to")
    assert error_line(raised.value).startswith("[Errno 2] No such file or directory: '")
    assert error_line(raised.value).count("Errno") == 1
