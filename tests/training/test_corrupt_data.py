"""A run on data of which some cannot be read: by default it ends and says what and where, or others stand in."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from support import damaged

FLAGS = """--data.window-rows 32 --schedule.num-timesteps 50 --model.image-size 4 --model.base-width 8
    --model.width-multipliers 1 2 --model.norm-groups 4 --model.attention-resolutions 2 --train.total-images 128
    --train.batch-size 16 --train.micro-batch-size 4 --train.log-every-images 32 --train.checkpoint-every-images 64
    --train.sample-every-images 0 --sample.num-images 4 --sample.num-sample-steps 5
    --cluster.num-workers 2 --cluster.threads-per-worker 1""".split()

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_ray_head")]


@pytest.fixture
def train(run_job: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def train(data: str, *flags: str, name: str = "run") -> Any:
        where = ("--data.shards", data, "--run.name", name, "--run.storage", str(tmp_path / "runs"))
        return run_job("train", "digits", *where, *FLAGS, *flags, cwd=tmp_path)

    return train


def refused(done: Any, *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [word for word in words if word not in error] == [], error
    assert "Traceback" not in done.stdout + done.stderr


def test_a_shard_exchanged_and_images_that_are_none(train: Callable[..., Any], tmp_path: Path) -> None:
    """The first is found by its checksum alone, and stands for too many images; the others end a run by default."""
    bad_files = {5: b"no image", 41: damaged.png(41, side=5)}
    location = damaged.prepare(str(tmp_path / "data"), encoded=True, bad_files=bad_files)
    other = damaged.prepare(str(tmp_path / "other"), encoded=True, bad_labels={30: 6})
    whole, exchanged = ((Path(at.path) / "train/00001.parquet").read_bytes() for at in (location, other))
    substitute = ("--data.on-corrupt", "substitute", "--data.max-corrupt-share", "0.1")
    damaged.rewrite(Path(location.path), 1, lambda _: exchanged)
    too_many = "cannot be read, more than --data.max-corrupt-share 0.1 allows"
    refused(train(location.uri, *substitute, name="exchanged"), too_many, "train/00001.parquet", "checksum")
    damaged.rewrite(Path(location.path), 1, lambda _: whole)

    refused(train(location.uri), "train/0000", "row group", "row ")
    assert not list((tmp_path / "runs/run").glob("checkpoint-*"))
    done = train(location.uri, *substitute)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = [json.loads(line) for line in (tmp_path / "runs/run/corrupt.jsonl").read_text().splitlines()]
    places = {(line["shard"], line["row_group"], line["row"]) for line in listed}
    assert places == {("train/00000.parquet", 0, 5), ("train/00001.parquet", 2, 1)}
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    key = json.loads((tmp_path / "runs/run/run.json").read_text())["run_key"]
    experiments = [e.experiment_id for e in client.search_experiments()]
    (tracked,) = client.search_runs(experiments, f"tags.`ddpm.run_key` = '{key}'")
    assert tracked.data.metrics["data/corrupt_images"] == 2
