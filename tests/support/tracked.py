"""Helpers that write a run's folder as training does, and read everything back that MLflow has of it."""

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient, entities

from ddpm.config.json import override, to_json
from ddpm.config.tree import Config, SampleConfig
from ddpm.runs import curves, run_folder
from ddpm.runs.curves import CurveRow
from ddpm.runs.evaluations import CheckpointResult, Report, SampledScores, Score
from ddpm.runs.run_folder import Data, Facts, RunFolder, RunStatus, Search, Status
from ddpm.tracking.mlflow_run import RUN_KEY_TAG
from ddpm.tracking.push import SENT_TAG
from ddpm.utils.images import png_bytes
from support.checkpoints import checkpoint_name
from support.front_end import Answer, FrontEnd
from support.tiny import TINY_NET

EXPERIMENT = "tracking"
CONFIG = override(TINY_NET, {"run.experiment": EXPERIMENT, "train.total_images": 128})
DATA = Data("digits", "4f" * 32, "s3://bucket/digits", "train", 1500, (8, 8, 1), 10)
COMMAND = "python jobs/train.py digits --run.name a-run"
BEGAN_MS = 1_700_000_000_000
PICTURE = png_bytes(np.full((6, 6, 3), 7, np.uint8))
EVALUATED = {
    "eval/bits_per_dim": 4.0,
    "eval_error/bits_per_dim": 0.1,
    "eval/KID-pixels": 0.03,
    "eval_error/KID-pixels": 0.002,
}


# A run's folder.


def begin(
    storage: Path | str, name: str = "a-run", config: Config = CONFIG, search: Search | None = None
) -> RunFolder:
    """A new run, which has not trained yet."""
    facts = Facts(
        preset="digits",
        changed={"optim.lr": 0.5},
        config=json.loads(to_json(config)),
        data=DATA,
        command="" if search else COMMAND,
        versions={"version.ddpm": "0.2.0"},
        search=search,
    )
    return run_folder.open_run(name, str(storage), facts)


def time_at(images_seen: int) -> int:
    return BEGAN_MS + images_seen


def loss_at(images_seen: int) -> float:
    return 1 / (images_seen + 1)


def append(run: RunFolder, rows: Iterable[CurveRow]) -> None:
    """Write a part of the curves."""
    name, data = curves.part(curves.num_rows(run.location), list(rows), 1)
    run.location.child(name).write(data)


def draw(run: RunFolder, series: str, images_seen: int) -> None:
    """Write a picture of a series."""
    image = np.full((8, 12, 3), images_seen % 256, np.uint8)
    file = run.location.child(f"{series}/{images_seen:012d}.png")
    file.write(png_bytes(image, time_at(images_seen)))


def store(run: RunFolder, images_seen: int, config: Config = CONFIG) -> None:
    """Write what tells a push of a checkpoint."""
    folder = run.location.child(checkpoint_name(images_seen))
    folder.child("config.json").write(to_json(config).encode())
    folder.child(run_folder.CHECKSUMS).write(b"{}")


def train(run: RunFolder, *steps: int, config: Config = CONFIG) -> None:
    """Write two metrics, a grid and a strip at each of `steps`, and a checkpoint at the last one."""
    rows = []
    for step in steps:
        rows.append(CurveRow("train/loss", step, loss_at(step), time_at(step)))
        rows.append(CurveRow("train/lr", step, 1e-3, time_at(step)))
        draw(run, run_folder.SAMPLES, step)
        draw(run, run_folder.DENOISING, step)
    append(run, rows)
    store(run, steps[-1], config)
    set_status(run, RunStatus.RUNNING, steps[-1])


def set_status(run: RunFolder, status: RunStatus, images_seen: int) -> None:
    ended_ms = None if status == RunStatus.RUNNING else time_at(images_seen) + 1
    run_folder.write_status(run.location, Status(status, images_seen, 0, 0.5, "2 cores", ended_ms))


def finish(run: RunFolder, images_seen: int = 128) -> None:
    """Write what a run writes at its end."""
    run.location.child(f"{run_folder.PICTURES}/noising.png").write(PICTURE)
    set_status(run, RunStatus.FINISHED, images_seen)


def evaluate(run: RunFolder, images_seen: int = 128, name: str = "at-128", bits: float = 4.0) -> None:
    """Write an evaluation with its picture."""
    drawn = SampledScores(SampleConfig(num_sample_steps=50), True, (Score("KID-pixels", 0.03, 0.002, 500),))
    result = CheckpointResult(
        checkpoint=f"{run.location.uri}/checkpoint",
        weights_sha256="",
        run=run.name,
        run_key=run.key,
        images_seen=images_seen,
        saw_this_data=True,
        bits=Score("bits/dim", bits, 0.1, 90),
        drawn=drawn,
    )
    report = Report({}, (result,), time_ms=time_at(images_seen) + 2)
    folder = run.location.child(run_folder.EVALUATIONS)
    folder.child(f"{name}.json").write(report.to_json().encode())
    folder.child(f"{name}.png").write(PICTURE)


def write_run(storage: Path | str, name: str = "a-run") -> RunFolder:
    """A finished and evaluated run, with values that are not finite."""
    run = begin(storage, name)
    train(run, 32, 64)
    odd = [
        CurveRow("train/loss", 80, float("nan"), time_at(80)),
        CurveRow("train/loss", 90, float("inf"), time_at(90)),
    ]
    append(run, odd)
    train(run, 96, 128)
    finish(run)
    evaluate(run)
    return run


# MLflow.


def run_with_key(uri: str, run_key: str) -> entities.Run:
    """The one active MLflow run of this run key."""
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`{RUN_KEY_TAG}` = '{run_key}'")
    return run


def history(uri: str, run: entities.Run, key: str) -> list[tuple[int, float]]:
    """All points of a metric in order, (step, value); duplicates are kept."""
    points = MlflowClient(uri).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def artifacts(uri: str, run: entities.Run) -> dict[str, bytes]:
    """All files by name."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(MlflowClient(uri).download_artifacts(run.info.run_id, "", temporary))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def content(uri: str, run: RunFolder) -> dict[str, Any]:
    """Everything that MLflow has of a run, except what depends on the server or on where the folder is."""
    found = run_with_key(uri, run.key)
    client = MlflowClient(uri)
    run_id = found.info.run_id
    histories = {}
    for name in found.data.metrics:
        points = client.get_metric_history(run_id, name)
        histories[name] = sorted((point.step, point.timestamp, repr(point.value)) for point in points)
    tags = {}
    for name, value in found.data.tags.items():
        if name != SENT_TAG:
            tags[name] = value.replace(run_id, "ID").replace(run.location.uri, "RUN")
    inputs = [
        (given.dataset.to_dictionary(), [(tag.key, tag.value) for tag in given.tags])
        for given in found.inputs.dataset_inputs
    ]
    return {
        "name": found.info.run_name,
        "experiment": client.get_experiment(found.info.experiment_id).name,
        "status": found.info.status,
        "time": (found.info.start_time, found.info.end_time),
        "params": found.data.params,
        "tags": tags,
        "newest": {name: repr(value) for name, value in found.data.metrics.items()},
        "metrics": histories,
        "data": inputs,
        "artifacts": artifacts(uri, found),
    }


def pictures_in(files: Iterable[str]) -> list[tuple[str, int, int, str]]:
    """Key, step, time and extension of each picture among the names of artifacts, sorted."""
    named = re.compile(r"images/(\w+)\+step\+(\d+)\+timestamp\+(\d+)\+[^.]*\.(png|webp)")
    matches = [named.fullmatch(name) for name in files if name.startswith("images/")]
    assert None not in matches, list(files)
    return sorted((match[1], int(match[2]), int(match[3]), match[4]) for match in matches if match)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without the line that `close` waits, which a busy machine gives too."""
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [line for line in lines if not line.startswith("waiting for MLflow at ")]


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
