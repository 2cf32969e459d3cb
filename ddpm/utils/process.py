"""Names of processes that another process can check: which machine, which pid, started when.

A pid alone is not enough: it is used again, and means another process on another machine or in another container.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Literal

ENDED = ("Z", "X")
"""States in /proc of a process that has ended and still has a pid."""


def token(pid: int | None = None) -> str:
    """The name of a process of this machine, of this one by default: "MACHINE-PID-START", without dots."""
    pid = os.getpid() if pid is None else pid
    return f"{_machine()}-{pid}-{_start(pid) or 'unknown'}"


def state(name: str) -> Literal["running", "gone", "unknown"]:
    """What became of the process called `name`; unknown: it is on another machine, or here is no /proc."""
    machine, pid, start = [*name.split("-"), "", "", ""][:3]
    if machine != _machine() or machine == "unknown" or not (pid.isdecimal() and start.isdecimal()):
        return "unknown"
    return "running" if _start(int(pid)) == start else "gone"


@functools.cache
def _machine() -> str:
    """This boot of this machine and this namespace of pids, as 12 hex digits; unknown: here is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{boot}{os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:12]
    except OSError:
        return "unknown"


def _start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot, which no change of the clock alters; None: it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before, in parentheses, may hold spaces
    return None if fields[0] in ENDED else fields[19]
