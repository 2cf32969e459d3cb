"""The exit of the program while a thread is in a call into Ray."""

import os
import sys
import threading
from typing import NoReturn

GRACE_S = 5.0
"""Time-out for the calls to return; two seconds are usual after a run was stopped."""

calls: list[threading.Thread] = []
"""Threads in a call into Ray that nothing can interrupt."""


def leave(code: int) -> NoReturn:
    """Exit the process, as sys.exit does unless a call into Ray does not return.

    Python's and Ray's clean-up frees what such a call uses, and the process may crash in it (Ray 2.60). Without the
    clean-up the processes of a cluster that was started here end with this one, as after SIGKILL.
    """
    for thread in calls:
        thread.join(GRACE_S)
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.is_alive() for thread in calls):
        os._exit(code)
    sys.exit(code)
