"""Uploaders that are killed: forks of this process that SIGKILL themselves right after their n-th change in MLflow.

It is a separate program because a process with threads, such as pytest, cannot fork safely. It prints JSON lines: the
run key of each run, and how many of its uploaders were killed.

    PYTHONPATH=tests python -m support.killed_uploaders URI FOLDER {each,all} {same,remade}

each: one run for every n: the first uploader is killed after change n, the next one is not killed.
all: one run whose uploaders are killed after 2, 5, 8, ... changes, until one finishes.
remade: after each kill the run resumes from an older checkpoint: its segments are written again, with new timestamps.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from ddpm.storage.locations import Location
from ddpm.tracking.mlflow_runs import Address
from support import tracked

CHANGES = ("create_run", "log_batch", "set_tag", "log_artifact", "set_terminated")
STEPS = (32, 64, 96, 128)


def write_segments(buffer: Location) -> None:
    time.sleep(0.002)  # so that the timestamps differ from the previous ones
    tracked.put(buffer, 64, 32, 64)
    tracked.put(buffer, 128, 96, 128, files=True)


def kill_self_after(change: int) -> None:
    """Make this process kill itself right after its `change`-th change in MLflow."""
    made = 0

    def counted(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            result = method(*args, **kwargs)
            made += 1
            if made == change:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CHANGES:
        setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))


def is_killed(address: Address, buffer: Location, change: int) -> bool:
    """Run an uploader that kills itself after `change` changes; returns whether it was killed before it finished."""
    pid = os.fork()
    if pid == 0:
        kill_self_after(change)
        done = tracked.deliver(address, buffer, STEPS[-1])
        os._exit(0 if done.undelivered == 0 and done.ended else 1)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit("an uploader lived and did not deliver")
    return os.WIFSIGNALED(status)


def main() -> None:
    uri, folder, which, segments = sys.argv[1:]
    for first in range(1, 1000):
        address, buffer = tracked.address_at(uri), tracked.spool_in(Path(folder, str(first)))
        write_segments(buffer)
        deaths = 0
        for change in range(2, 1000, 3) if which == "all" else (first, 1000):
            if not is_killed(address, buffer, change):
                break
            deaths += 1
            if segments == "remade":
                write_segments(buffer)
        print(json.dumps({"key": address.run_key, "deaths": deaths}), flush=True)
        if which == "all" or deaths == 0:
            return


if __name__ == "__main__":
    main()
