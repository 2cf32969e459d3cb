"""A clock that jumps, for every Python process that finds this folder on PYTHONPATH.

`time.time` and `time.time_ns` are off by as many seconds as the file CLOCK_OFFSET_FILE says. Ray's C++ keeps the
machine's clock: under libfaketime, which would change it too, an actor with threads does not start (2.60).
"""

import copyreg
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any


def _offset_s() -> int:
    try:
        return int(Path(os.environ["CLOCK_OFFSET_FILE"]).read_text() or 0)
    except (KeyError, OSError, ValueError):
        return 0


def _jumping(real: Callable[[], float]) -> Callable[[], float]:
    return lambda: real() + _offset_s()


def _jumping_ns(real: Callable[[], int]) -> Callable[[], int]:
    return lambda: real() + _offset_s() * 10**9


def _clock(name: str) -> Any:
    return getattr(time, name)


def _reduced(function: Any) -> Any:
    """For pickle, which would not find the real clock, which somebody has kept, under its name."""
    return (_clock, (function.__name__,)) if function in _REAL else function.__reduce__()


_REAL = time.time, time.time_ns
copyreg.pickle(BuiltinFunctionType, _reduced)
time.time, time.time_ns = _jumping(time.time), _jumping_ns(time.time_ns)
