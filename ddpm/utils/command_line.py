"""The command line of this process, for the record of a run and for messages."""

import shlex
import sys
from contextvars import ContextVar

CALL = ContextVar("CALL", default="")
"""The call in Python that stands for a command line in this process."""


def typed() -> str:
    """The command line of this process, such as "ddpm train digits"."""
    call = CALL.get()
    if call:
        return call
    # The program `ddpm` names itself "ddpm COMMAND".
    return f"{sys.argv[0]} {shlex.join(sys.argv[1:])}".rstrip()
