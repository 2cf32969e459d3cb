"""Sends a search and its trials to MLflow while the search runs; publish.py sends the results at its end."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ddpm.runs import run_folder
from ddpm.runs.run_folder import RunFolder
from ddpm.search.trials import Trials
from ddpm.tracking import mlflow_run
from ddpm.tracking.mlflow_client import Connection, tracking_uri
from ddpm.tracking.mlflow_pages import STOPPED
from ddpm.tracking.mlflow_run import MlflowRun
from ddpm.tracking.pusher import push_patiently
from ddpm.utils.errors import UserError

STATUS: dict[str, run_folder.StatusName] = {
    "finished": "FINISHED",
    "stopped": "PRUNED",
    "failed": "FAILED",
    "running": "STOPPED",
}
"""A run's status for each status of a trial."""
RETRY_S = 10.0
INTERRUPTED_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Parent:
    """The search's run in MLflow, which its trials are shown under."""

    search: run_folder.Search
    experiment: str
    is_tracked: bool = True
    """False: run.tracking is none, so nothing is sent."""

    def open(self) -> MlflowRun:
        """Find or create it; raises MlflowError."""
        mlflow = Connection(tracking_uri())
        search = self.search
        return mlflow_run.open_run(mlflow, self.experiment, search.key, search.name, source="ddpm search")


class Publisher:
    """Pushes the search and its trials to MLflow, in a background thread of the search's driver.

    Without tracking it only records outcomes in the runs' folders.

    Args:
        params: of the search, for its own run.
        warn: called with a line when MLflow does not accept data.
    """

    def __init__(
        self, parent: Parent, trials: Trials, params: Mapping[str, Any], warn: Callable[[str], object]
    ) -> None:
        self._parent = parent
        self._trials = trials
        self._params = params
        self._warn = warn
        self._has_warned = False
        self._has_begun = False
        self._names: queue.Queue[str | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ddpm-mlflow", daemon=True)
        self._thread.start()

    def notify(self, name: str) -> None:
        """Push a trial soon: there is something new in its folder."""
        self._names.put(name)

    def close(self, timeout_s: float) -> None:
        """End the thread after the call that it is in; what is left is pushed by `store`."""
        self._closing.set()
        self._names.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while True:
            name = self._names.get()
            if name is None:
                return
            is_sent = False
            while not is_sent:
                if self._closing.is_set():
                    return
                is_sent = self._try(name)
                if not is_sent:
                    self._closing.wait(RETRY_S)

    def _try(self, name: str) -> bool:
        """Whether MLflow has the trial now, or need not have it."""
        try:
            if not self._parent.is_tracked:
                record_outcome(self._trials, name)
                return True
            if not self._has_begun:
                run = self._parent.open()
                run.log_params(self._params)
                run.set_status("RUNNING")
                self._has_begun = True
            push_trial(self._trials, name)
        except (UserError, OSError) as error:
            if not self._has_warned:
                self._warn(f"MLflow does not accept the search, which is sent later: {error}")
            self._has_warned = True
            return False
        self._has_warned = False
        return True


def push_trial(trials: Trials, name: str, timeout_s: float = 0.0) -> None:
    """Push a trial's run with its outcome."""
    run = record_outcome(trials, name)
    if run is not None:
        push_patiently(run, timeout_s)


def record_outcome(trials: Trials, name: str) -> RunFolder | None:
    """Write a trial's outcome into its run's status.json; returns the run, or None if the trial never began."""
    try:
        run = run_folder.existing_run(trials.folder.child(name).uri)
    except UserError:
        return None
    trial = trials.get(name)
    status = run_folder.read_status(run.location)
    assert trial is not None, "trials are pushed by name"
    if status is not None and trial.status != "running" and status.status != STATUS[trial.status]:
        now_ms = int(time.time() * 1000)
        run_folder.write_status(run.location, replace(status, status=STATUS[trial.status], ended_ms=now_ms))
    return run


def mark_interrupted(parent: Parent, trials: Trials) -> None:
    """Set the status of the search, and of trials that have not ended, to a stopped one's.

    In MLflow, too, if it answers within INTERRUPTED_TIMEOUT_S.
    """
    running = [trial.name for trial in trials.all() if trial.status == "running"]
    for name in running:
        with contextlib.suppress(UserError, OSError):  # the next start does not depend on it
            location = trials.folder.child(name)
            status = run_folder.read_status(location)
            if status is not None:
                now_ms = int(time.time() * 1000)
                run_folder.write_status(location, replace(status, status="STOPPED", ended_ms=now_ms))
    if not parent.is_tracked:
        return

    def push() -> None:
        with contextlib.suppress(UserError, OSError):
            parent.open().set_status(STOPPED)
            for name in running:
                push_trial(trials, name)

    thread = threading.Thread(target=push, name="ddpm-mlflow-end", daemon=True)
    thread.start()
    thread.join(INTERRUPTED_TIMEOUT_S)
