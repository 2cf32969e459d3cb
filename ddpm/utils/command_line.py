"""Command lines in messages: jobs/sync.py, with or without `python`, is `ddpm sync` where there is no checkout."""

import re
import shlex
import sys
from contextvars import ContextVar
from pathlib import Path

IN_CHECKOUT = (Path(__file__).parents[2] / "jobs").is_dir()
CALL = ContextVar("CALL", default="")
"""The call in Python that stands for a command line in this process."""
SCRIPT = re.compile(r"(?:python |(?<![\w./-]))(?:jobs|tune)/(\w+)\.py")


def installed(text: str) -> str:
    """`text`, with the commands that it names as they are called here."""
    return text if IN_CHECKOUT else SCRIPT.sub(r"ddpm \1", text)


def typed() -> str:
    """The command line of this process."""
    call = CALL.get()
    if call:
        return call
    program = sys.argv[0]
    started = program if program.startswith("ddpm ") else f"python {shlex.quote(program)}"
    return f"{started} {shlex.join(sys.argv[1:])}".rstrip()
