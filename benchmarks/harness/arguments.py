"""The command line of a benchmark: its own flags, and --smoke.

With --smoke it does as little as shows that it works: the numbers mean nothing, and tables and pictures go to a new
temporary folder.
"""

import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

from harness import tables

T = TypeVar("T")

SMOKE = "--smoke"


def read(kind: type[T], description: str | None, **smallest: Any) -> T:
    """The arguments, of the dataclass `kind`; `smallest` are the values of its fields with --smoke."""
    words = [word for word in sys.argv[1:] if word != SMOKE]
    arguments = tyro.cli(kind, description=description, args=words)
    if SMOKE not in sys.argv:
        return arguments
    tables.folder = Path(tempfile.mkdtemp(prefix="smoke-"))
    names = {field.name for field in fields(arguments)}  # type: ignore[arg-type]
    return replace(arguments, **{name: value for name, value in smallest.items() if name in names})  # type: ignore[type-var]
