"""A shifted clock for every Python process that has this folder on PYTHONPATH.

The file CLOCK_OFFSET_FILE contains the offset of `time.time` and `time.time_ns` in seconds. Ray's C++ code keeps the
machine's clock: libfaketime would change that too, but under it an actor with threads does not start (Ray 2.60).
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
    """Reducer for pickle: it cannot find a saved reference to the real clock under its name."""
    return (_clock, (function.__name__,)) if function in _REAL else function.__reduce__()


_REAL = time.time, time.time_ns
copyreg.pickle(BuiltinFunctionType, _reduced)
time.time = _jumping(time.time)
time.time_ns = _jumping_ns(time.time_ns)
