"""Targets for processes that tests kill, forked from one that has imported MLflow; they import this module."""

import os
import signal
from typing import Any

from mlflow import MlflowClient

from ddpm.storage import locations
from ddpm.tracking import mlflow_client
from ddpm.tracking.mlflow_runs import Address
from support import tracked

CHANGES = ("create_run", "log_batch", "set_tag", "log_artifact", "set_terminated")


def connect(uri: str) -> None:
    mlflow_client.connect(uri)


def create_experiment(uri: str, name: str) -> None:
    mlflow_client.connect(uri).create_experiment(name)


def deliver_and_die(address: Address, buffer: str, committed: int, last_change: int) -> None:
    """Run an uploader; this process kills itself right after that change in MLflow, unless it finishes before."""
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
    done = tracked.deliver(address, locations.resolve(buffer), committed)
    assert done.undelivered == 0 and done.ended
