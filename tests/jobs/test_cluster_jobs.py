"""The jobs with shards in a bucket."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest

from ddpm.runs.storage import resolve

SMALL = """--schedule.num-timesteps 100 --model.base-width 8 --model.norm-groups 4 --optim.lr-warmup-images 0
    --train.total-images 512 --train.batch-size 64 --train.micro-batch-size 16 --train.log-every-images 128
    --train.checkpoint-every-images 256 --train.sample-every-images 256 --train.held-out-images 32
    --sample.num-images 9 --sample.num-sample-steps 5""".split()


@pytest.mark.slow
def test_fashion_mnist_from_a_bucket_with_two_workers(
    run_job: Callable[..., Any], s3_bucket: str, mlflow_server: str, tmp_path: Path
) -> None:
    """Shards, checkpoints and images are in S3; only prepare and train are used."""
    if not Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("Fashion-MNIST is missing; `apt-get install dataset-fashion-mnist` brings it")
    shards = f"{s3_bucket}/fashion-mnist"
    done = run_job("prepare", "fashion-mnist", shards, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    env = {"MLFLOW_TRACKING_URI": mlflow_server}
    where = ("--data.shards", shards, "--run.storage", f"{s3_bucket}/runs", "--run.name", "fashion")
    done = run_job(
        "train", "fashion-mnist", *where, *SMALL, "--cluster.num-workers", "2", cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    run = resolve(f"{s3_bucket}/runs/fashion")
    newest = run.child("checkpoint-000000000512-g1")
    assert json.loads(newest.child("state.json").read())["images_seen"] == 512
    assert run.child("samples/latest.png").read().startswith(b"\x89PNG")
    done = run_job("sample", f"{s3_bucket}/runs/fashion", "--num-images", "4", "--out", "drawn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "drawn/images").glob("*.png"))) == 4
    client = mlflow.MlflowClient(mlflow_server)
    (found,) = client.search_runs(
        [client.get_experiment_by_name("ddpm").experiment_id], "attributes.run_name = 'fashion'"
    )
    grids = [f.path for f in client.list_artifacts(found.info.run_id, "images") if "samples" in f.path]
    assert any(path.endswith(".png") for path in grids)


def test_a_missing_or_forbidden_bucket_is_a_user_error(
    user_error: Callable[..., str], s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = user_error("train", "digits", "--data.shards", "s3://no-such-bucket-here/d")
    assert "bucket 'no-such-bucket-here' does not exist" in missing
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    refused = user_error("train", "digits", "--run.storage", f"{s3_bucket}/runs")
    assert "S3 refuses access to bucket" in refused
    assert list(tmp_path.iterdir()) == []
