"""A run on partly unreadable data: by default it ends with an error that says where, or it uses substitutes."""

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


def assert_user_error(done: Any, *fragments: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [fragment for fragment in fragments if fragment not in error] == [], error
    assert "Traceback" not in done.stdout + done.stderr


def test_a_swapped_shard_and_invalid_images(train: Callable[..., Any], tmp_path: Path) -> None:
    """A swapped shard is found only by its checksum, and makes too many images unreadable; invalid images end a run by
    default."""
    bad_files = {5: b"no image", 41: damaged.png(41, side=5)}
    location = damaged.prepare(str(tmp_path / "data"), encoded=True, bad_files=bad_files)
    other = damaged.prepare(str(tmp_path / "other"), encoded=True, bad_labels={30: 6})
    whole, swapped = ((Path(at.path) / "train/00001.parquet").read_bytes() for at in (location, other))
    substitute = ("--data.on-corrupt", "substitute", "--data.max-corrupt-share", "0.1")
    damaged.rewrite(Path(location.path), 1, lambda _: swapped)
    too_many = "cannot be read, more than --data.max-corrupt-share 0.1 allows"
    assert_user_error(
        train(location.uri, *substitute, name="exchanged"), too_many, "train/00001.parquet", "checksum"
    )
    damaged.rewrite(Path(location.path), 1, lambda _: whole)

    assert_user_error(train(location.uri), "train/0000", "row group", "row ")
    assert not list((tmp_path / "runs/run").glob("checkpoint-*"))
    done = train(location.uri, *substitute)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = [json.loads(line) for line in (tmp_path / "runs/run/corrupt.jsonl").read_text().splitlines()]
    places = {(line["shard"], line["row_group"], line["row"]) for line in listed}
    assert places == {("train/00000.parquet", 0, 5), ("train/00001.parquet", 2, 1)}
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    key = json.loads((tmp_path / "runs/run/run.json").read_text())["run_key"]
    experiments = [e.experiment_id for e in client.search_experiments()]
    (mlflow_run,) = client.search_runs(experiments, f"tags.`ddpm.run_key` = '{key}'")
    assert mlflow_run.data.metrics["data/corrupt_images"] == 2
