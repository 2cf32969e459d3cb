"""Helpers that write segments to a run's spool, deliver them, and read the result back from MLflow."""

import json
import logging
import re
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.tracking.metrics_buffer import MetricsBuffer, Record, pack, segment_name
from ddpm.tracking.mlflow_runs import RUN_KEY_TAG, Address
from ddpm.tracking.uploader import Uploader
from support.front_end import Answer, FrontEnd

PARAMS = {"optim.lr": 1e-3, "model.width_multipliers": (1, 2), "data.source": None}
EXPERIMENT = "tracking"
FILES = {"pictures/strip.txt": b"strip", "card.txt": b"card"}


def address_at(uri: str, key: str | None = None) -> Address:
    return Address(uri, EXPERIMENT, "a-run", key or uuid.uuid4().hex)


def spool_in(folder: Path | str) -> Location:
    return locations.resolve(str(folder)).child("tracking")


def track(buffer: MetricsBuffer, *steps: int, files: bool = False) -> None:
    """Record two metrics and an image at each of `steps`."""
    for step in steps:
        buffer.metrics({"train/loss": 1 / (step + 1), "train/lr": 1e-3}, step)
        buffer.image("samples", np.full((8, 12, 3), step % 256, np.uint8), step)
    if files:
        for name, data in FILES.items():
            buffer.artifact(name, data)


def put(buffer: Location, at: int, *steps: int, failed: bool = False, files: bool = False) -> Location:
    """Write a segment that ends at position `at`, as a worker does."""
    gathered = MetricsBuffer()
    track(gathered, *steps, files=files)
    return put_records(buffer, at, *gathered.take(), failed=failed)


def put_records(buffer: Location, at: int, *records: Record, failed: bool = False) -> Location:
    """Write a segment of given records."""
    segment = buffer.child(segment_name(at, failed))
    segment.write(pack(list(records)))
    return segment


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without the line that `close` waits, which a busy machine gives too."""
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [line for line in lines if not line.startswith("waiting for MLflow at ")]


def deliver(
    address: Address, buffer: Location, committed: int, status: str = "FINISHED", **params: Any
) -> Any:
    """Run an uploader from start to close; returns what `close` returns."""
    uploader = Uploader(address, PARAMS | params, buffer)
    uploader.committed(committed)
    return uploader.close(status, patience_s=120)


def names_in(buffer: Location) -> list[str]:
    path = Path(buffer.path)
    return sorted(file.name for file in path.iterdir()) if path.exists() else []


def run_with_key(uri: str, run_key: str) -> Run:
    """The one MLflow run of this run key."""
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`{RUN_KEY_TAG}` = '{run_key}'")
    return run


def run_of(address: Address) -> Run:
    return run_with_key(address.uri, address.run_key)


def history(uri: str, run: Run, key: str) -> list[tuple[int, float]]:
    """All points of a metric in order, (step, value); duplicates are kept."""
    points = MlflowClient(uri).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def points(address: Address, key: str = "train/loss") -> list[tuple[int, float]]:
    return history(address.uri, run_of(address), key)


def image_counts(address: Address) -> Counter[tuple[int, str]]:
    """Number of copies of each image: (step, file extension) -> count."""
    files = MlflowClient(address.uri).list_artifacts(run_of(address).info.run_id, "images")
    found: Counter[tuple[int, str]] = Counter()
    for file in files:
        match = re.fullmatch(r"images/samples\Wstep\W(\d+)\W.*\.(png|webp)", file.path)
        assert match is not None, file.path
        found[int(match[1]), match[2]] += 1
    return found


def assert_delivered_once(address: Address, *steps: int) -> None:
    """MLflow has everything that `track` recorded at `steps` exactly once, and nothing else."""
    for key, value in {"train/loss": lambda step: 1 / (step + 1), "train/lr": lambda step: 1e-3}.items():
        assert points(address, key) == [(step, value(step)) for step in sorted(steps)]
    assert image_counts(address) == {(step, kind): 1 for step in steps for kind in ("png", "webp")}


class MlflowFaultProxy(FrontEnd):
    """A proxy in front of an MLflow server that injects the failures that `fails` chooses.

    `fails` takes a request's method, path and body. It returns the (status, JSON body) to answer with, or None to
    forward the request.
    """

    fails: Callable[[str, str, bytes], tuple[int, dict[str, str]] | None] = staticmethod(
        lambda *request: None
    )

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if fault := self.fails(method, path, body):
            return fault[0], json.dumps(fault[1]).encode(), {"Content-Type": "application/json"}
        return None
