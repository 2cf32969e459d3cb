"""Names of processes that another process can check: machine, pid and start time.

A pid alone is not enough: pids are reused, and mean other processes on other machines or in other containers.
"""

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Literal

TOKEN = re.compile(r"(?P<machine>[0-9a-f]{12})-(?P<pid>\d+)-(?P<start>\d+)")
"""The name of a process whose start time and machine are known."""
ENDED = ("Z", "X")
"""States in /proc of a process that has ended and still has a pid."""


def token() -> str:
    """The name of this process: "MACHINE-PID-START", without dots."""
    return f"{_machine()}-{os.getpid()}-{_start(os.getpid()) or 'unknown'}"


def state(name: str) -> Literal["running", "gone", "unknown"]:
    """Whether the process called `name` runs; unknown: it is on another machine, or there is no /proc here."""
    named = TOKEN.fullmatch(name)
    if named is None or named["machine"] != _machine():
        return "unknown"
    return "running" if _start(int(named["pid"])) == named["start"] else "gone"


@functools.cache
def _machine() -> str:
    """12 hex digits for this boot of this machine and this pid namespace; unknown: there is no /proc here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{boot}{os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:12]
    except OSError:
        return "unknown"


def _start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, independent of the wall clock; None: it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before, in parentheses, may hold spaces
    return None if fields[0] in ENDED else fields[19]
