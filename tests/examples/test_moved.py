"""What was in the library and is an example now: who asks for it is told where it is."""

import re
import sys
from collections.abc import Callable

import pytest
from support.processes import REPO

from ddpm.cli import program
from ddpm.utils.errors import UserError

MOVED = [
    "sample run --inpaint a.png --mask b.png",
    "sample run --inpaint=a.png",
    "export run out --format pt2",
    "export run out --format=pt2",
    "train glyphs",
    "prepare glyphs shards",
    "train digits --data.source glyphs",
    "train digits --model.net dit",
    "train digits --objective.process consistency",
    "train digits --sampler multistep",
    "sample run --sampler multistep",
]


def check(message: str) -> None:
    (path,) = re.findall(r"examples/[\w./]*\w", message)
    assert (REPO / path).exists(), path


@pytest.mark.parametrize("command_line", MOVED)
def test_the_error_names_the_example(user_error: Callable[..., str], command_line: str) -> None:
    check(user_error(*command_line.split()))


def test_the_error_of_the_program_names_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpm", "demo", "builtin:digits"])
    with pytest.raises(UserError) as raised:
        program._command()
    check(str(raised.value))
