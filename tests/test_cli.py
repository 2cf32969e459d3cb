"""Whatever happens in a job, a person and a script can tell."""

from collections.abc import Callable

import pytest

from ddpm import cli
from ddpm.config import UserError


class Refused(UserError):
    exit_code = 1


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "shown"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(UserError("no such bucket")), 2, "error: no such bucket\n"),
        (raising(Refused("gave up")), 1, "error: gave up\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_a_job_ends_with_a_code_and_at_most_a_line(
    main: Callable[[], int | None], code: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == shown


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()))
