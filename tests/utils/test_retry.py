"""What fails is tried again until it answers or the time is over; what is an answer is none too late."""

import re
import shutil
import time
from pathlib import Path

import pytest

from ddpm.utils.errors import UserError
from ddpm.utils.retry import LONGEST_ANSWER, StorageError, answer, retry_io


class Falters:
    """A call that raises `error` the first `times` times."""

    def __init__(self, times: float, error: Exception) -> None:
        self.times, self.error, self.calls = times, error, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.calls


def test_it_goes_on_until_there_is_an_answer() -> None:
    assert retry_io(Falters(3, OSError("busy")), where="s3://b", timeout_s=60) == 4


def test_down_for_good_is_one_line_that_says_all() -> None:
    call = Falters(float("inf"), OSError("AWS Error SLOW_DOWN:\n  reduce your\trate"))
    with pytest.raises(StorageError) as caught:
        retry_io(call, where="s3://bucket/runs", timeout_s=0.5)
    expected = (
        r"s3://bucket/runs: storage has failed for \d+ s \(--run\.storage-timeout-s 0\.5\); its last answer: "
        r"AWS Error SLOW_DOWN: reduce your rate"
    )
    assert re.fullmatch(expected, str(caught.value))
    assert caught.value.exit_code == 1 and isinstance(caught.value, UserError)
    assert call.calls >= 2


def test_without_time_there_is_one_try() -> None:
    call = Falters(1, OSError("no"))
    with pytest.raises(StorageError, match="no"):
        retry_io(call, where="disk", timeout_s=0)
    assert call.calls == 1


def test_the_last_try_begins_at_the_time_out() -> None:
    """Whatever the back-off would be by then: storage that is back just before it is found."""
    began = time.monotonic()
    tries: list[float] = []

    def call() -> None:
        tries.append(time.monotonic() - began)
        raise OSError("no")

    with pytest.raises(StorageError):
        retry_io(call, where="disk", timeout_s=1.5)
    assert tries[-1] >= 1.5


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), ValueError("x"), UserError("x"), KeyboardInterrupt()]
)
def test_what_waiting_does_not_mend_is_raised_at_once(error: Exception) -> None:
    call = Falters(1, error)
    with pytest.raises(type(error)) as caught:
        retry_io(call, where="disk", timeout_s=60)
    assert caught.value is error and call.calls == 1


def test_no_credentials_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret+key/1")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "")
    text = (
        "denied AKIAABCDEFGHIJKLMNOP (topsecret+key/1) at https://me:pass@host/b?X-Amz-Signature=0a1b "
        "for arn:aws:iam::123:user/me"
    )
    assert answer(OSError(text)) == (
        "denied *** (***) at https://***@host/b?X-Amz-Signature=*** for arn:aws:iam::123:user/me"
    )
    assert answer(OSError()) == "OSError"
    assert len(answer(OSError("x" * 10_000))) == LONGEST_ANSWER + 3


def test_a_copy_that_failed_is_one_reason(tmp_path: Path) -> None:
    """shutil says it as a list of lists."""
    (tmp_path / "from").mkdir()
    for name in ("a", "b"):
        (tmp_path / "from" / name).symlink_to("nothing")
    with pytest.raises(shutil.Error) as raised:
        shutil.copytree(tmp_path / "from", tmp_path / "to")
    assert answer(raised.value).startswith("[Errno 2] No such file or directory: '")
    assert answer(raised.value).count("Errno") == 1
