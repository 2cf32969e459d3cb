"""Helpers that write segments to a run's spool, deliver them, and read the result back from MLflow."""

import json
import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import numpy as np
import requests
from mlflow import MlflowClient
from mlflow.entities import Run

from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.tracking.metrics_buffer import MetricsBuffer, segment_name
from ddpm.tracking.mlflow_runs import RUN_KEY_TAG, Address
from ddpm.tracking.uploader import Uploader
from support import servers

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
    data = gathered.take()
    assert data is not None
    segment = buffer.child(segment_name(at, failed))
    segment.write(data)
    return segment


def deliver(
    address: Address, buffer: Location, committed: int, status: str = "FINISHED", **params: Any
) -> Any:
    """Run an uploader from start to close; returns what `close` returns."""
    uploader = Uploader(address, PARAMS | params, buffer)
    uploader.committed(committed)
    return uploader.close(status)


def names_in(buffer: Location) -> list[str]:
    path = Path(buffer.path)
    return sorted(file.name for file in path.iterdir()) if path.exists() else []


def run_of(address: Address) -> Run:
    """The one MLflow run of this run key."""
    client = MlflowClient(address.uri)
    experiment = client.get_experiment_by_name(address.experiment)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{address.run_key}'")
    return run


def points(address: Address, key: str = "train/loss") -> list[tuple[int, float]]:
    """All points of a metric, sorted; duplicates are kept."""
    found = MlflowClient(address.uri).get_metric_history(run_of(address).info.run_id, key)
    return sorted((point.step, point.value) for point in found)


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


class MlflowFaultProxy:
    """A proxy in front of an MLflow server that injects the failures that `fails` chooses.

    `fails` takes a request's method, path and body. It returns the (status, JSON body) to answer with, or None to
    forward the request.
    """

    def __init__(self, uri: str) -> None:
        self.fails: Callable[[str, str, bytes], tuple[int, dict[str, str]] | None] = lambda *request: None
        self.requests = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None: ...

            def answer(self) -> None:
                proxy.requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if fault := proxy.fails(self.command, self.path, body):
                    status, data, kind = fault[0], json.dumps(fault[1]).encode(), "application/json"
                else:
                    reply = requests.request(
                        self.command,
                        uri + self.path,
                        data=body,
                        headers={"Content-Type": self.headers.get("Content-Type", "application/json")},
                        timeout=30,
                    )
                    status, data, kind = (
                        reply.status_code,
                        reply.content,
                        reply.headers.get("Content-Type", "text/plain"),
                    )
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815

        self._server = ThreadingHTTPServer((servers.LOOPBACK, 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://{servers.LOOPBACK}:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
