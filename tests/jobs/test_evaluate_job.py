"""python jobs/evaluate.py from the command line, while the run is still training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from support.evaluated import POSITIONS, make_data, make_run

from ddpm.runs import names
from ddpm.runs.run_folder import RunFolder
from ddpm.tracking.push import push

FEW = ("--features", "pixels", "--num-images", "60", "--num-draws", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("runs"), make_data(tmp_path_factory.mktemp("data")))


@pytest.mark.slow
@pytest.mark.lowest
def test_all_checkpoints_of_a_run_that_is_still_training(
    run_job: Callable[..., Any],
    run: RunFolder,
    mlflow_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    client = MlflowClient(mlflow_server)
    run_id = push(run).run_id
    words = (run.location.uri, "--all-checkpoints", *FEW)
    done = run_job("evaluate", *words, "--out", "found.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert {"bits/dim 180/180", "images sampled 180/180"} <= set(lines)
    pictures = [f"found-nearest-{number}.png" for number in (1, 2, 3)]
    assert [line for line in lines[-6:] if not line.startswith("run ")] == [
        f"results     {tmp_path}/found.json",
        *(f"nearest     {tmp_path}/{name}" for name in pictures),
        f"MLflow      run {run_id} in {mlflow_server}",
    ]
    (kept,) = Path(run.location.path, "evaluations").glob("*.json")
    report = json.loads((tmp_path / "found.json").read_text())
    in_run = json.loads(kept.read_text())
    assert in_run.pop("time_ms") > report.pop("time_ms") == 0 and in_run == report
    for judged in report["checkpoints"]:
        assert np.mean(judged["bits_of_image"]) == pytest.approx(judged["bits"]["value"], abs=1e-5)
    assert [judged["images_seen"] for judged in report["checkpoints"]] == list(POSITIONS)
    numbers = [judged["bits"] for judged in report["checkpoints"]]
    numbers += [score for judged in report["checkpoints"] for score in judged["drawn"]["scores"]]
    for score in numbers:
        uncertainty = (
            f"[{score['low']:.4f}, {score['high']:.4f}]" if "low" in score else f"± {score['error']:.4f}"
        )
        assert f"{score['value']:.4f} {uncertainty}" in done.stdout
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    history = client.get_metric_history(run_id, "eval/KID-pixels")
    ours = [judged["drawn"]["scores"][1]["value"] for judged in report["checkpoints"]]
    assert [(point.step, point.value) for point in history] == list(zip(POSITIONS, ours, strict=True))
    low = client.get_metric_history(run_id, "eval_low/nearer_than_held_out-pixels")
    assert [point.step for point in low] == list(POSITIONS)
    paths = [file.path for file in client.list_artifacts(run_id, "evaluation")]
    assert len([path for path in paths if "-nearest-" in path]) == len(pictures)
    assert client.get_run(run_id).info.status == "RUNNING"

    newest = names.checkpoints_of(run.location.uri)[-1]
    again = run_job("evaluate", newest, *FEW, "--out", "again.json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    judged = json.loads((tmp_path / "again.json").read_text())["checkpoints"]
    assert judged == report["checkpoints"][-1:]
    assert len(client.get_metric_history(run_id, "eval/KID-pixels")) == len(POSITIONS)
