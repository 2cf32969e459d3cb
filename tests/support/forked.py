"""Targets for processes that tests kill, forked from one that has imported MLflow; they import this module."""

import os
import signal
from typing import Any

from mlflow import MlflowClient

from ddpm.runs import run_folder
from ddpm.tracking.mlflow_client import Connection
from ddpm.tracking.pusher import push_patiently

CHANGES = (
    "create_experiment",
    "create_run",
    "log_batch",
    "log_artifact",
    "log_inputs",
    "update_run",
    "set_terminated",
)


def connect(uri: str) -> None:
    Connection(uri)


def create_experiment(uri: str, name: str) -> None:
    Connection(uri).client.create_experiment(name)


def push(uri: str, folder: str) -> None:
    """Push the run in `folder` to MLflow at `uri`."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    push_patiently(run_folder.existing_run(folder), timeout_s=120)


def push_and_die(uri: str, folder: str, last_change: int) -> None:
    """Push a run; this process kills itself right after that change in MLflow, unless it finishes before."""
    made = 0

    def counted(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            result = method(*args, **kwargs)
            made += 1
            if made == last_change:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CHANGES:
        setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    push(uri, folder)
