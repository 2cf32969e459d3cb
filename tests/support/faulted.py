"""A run of two workers for fault-injection tests, and the comparison of its final state with an undisturbed run."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import mlflow.entities
import numpy as np
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from ddpm.checkpoints import runs
from ddpm.data.manifest import make_manifest, write_manifest
from ddpm.data.shards import write_shard
from ddpm.hub import resolve
from ddpm.storage import locations
from support import processes

TOTAL = 6_400
FLAGS = f"""--data.window-rows 200 --data.horizontal-flip --schedule.num-timesteps 50 --model.dropout 0.1
    --model.base-width 8 --model.width-multipliers 1 2 --model.norm-groups 4 --optim.lr-warmup-images 640
    --train.total-images {TOTAL} --train.batch-size 64 --train.micro-batch-size 16
    --train.log-every-images 320 --train.checkpoint-every-images 640 --train.sample-every-images 3200
    --train.held-out-images 8 --sample.num-images 4 --sample.num-sample-steps 5
    --cluster.num-workers 2 --cluster.threads-per-worker 1""".split()


class Run:
    """One training run; its job may be started several times.

    Args:
        name: of the run.
        uri: folder or bucket that holds runs.
        data: folder or bucket of the data set.
        log: the file that takes the job's output.
    """

    def __init__(self, name: str, uri: str, data: str, log: Path) -> None:
        self.location, self._log = locations.resolve(uri).child(name), log
        self.arguments = ["digits", "--data.shards", data, "--run.name", name, "--run.storage", uri, *FLAGS]

    def start(self, *flags: str, env: dict[str, str] | None = None) -> processes.Job:
        return processes.Job("train", *self.arguments, *flags, log=self._log, env=env)

    def position(self) -> int:
        """Position of the newest checkpoint; 0 if there is none."""
        found = runs.checkpoints(self.location)
        return int(found[-1].path.rpartition("checkpoint-")[2]) if found else 0

    def past(self, position: int) -> Callable[[], bool]:
        return lambda: self.position() > position

    def tensors(self, total: int = TOTAL) -> dict[str, torch.Tensor]:
        """Tensors of net, EMA and optimizer in the last checkpoint, which must be at `total` images."""
        assert self.position() == total
        with resolve.local_checkpoint(self.location.uri) as folder:
            return {
                f"{file}.{name}": tensor
                for file in ("net", "ema", "optimizer")
                for name, tensor in load_file(folder / f"{file}.safetensors").items()
            }


def write_digits(folder: Path) -> str:
    """Write scikit-learn's digits as shards (600 training images in two shards, 60 held out); returns their URI."""
    location = locations.resolve(str(folder))
    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    shards = {
        split: [
            write_shard(
                location,
                f"{split}/{i:05d}.parquet",
                images[part],
                labels[part],
                rows_per_row_group=100,
            )
            for i, part in enumerate(parts)
        ]
        for split, parts in {
            "train": [slice(0, 350), slice(350, 600)],
            "test": [slice(600, 660)],
        }.items()
    }
    names = [str(i) for i in range(10)]
    manifest = make_manifest("digits", 8, 8, 1, "raw", names, shards, options="test")
    write_manifest(location, manifest)
    return location.uri


def assert_same(run: Run, undisturbed: Run) -> None:
    """The final tensors are bitwise equal."""
    first, second = run.tensors(), undisturbed.tensors()
    assert first.keys() == second.keys() and len(first) > 100
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def mlflow_run_of(run: Run) -> mlflow.entities.Run:
    """The run's only MLflow run."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    key = json.loads(run.location.child("run.json").read())["run_key"]
    experiments = [e.experiment_id for e in client.search_experiments()]
    (found,) = client.search_runs(experiments, f"tags.`ddpm.run_key` = '{key}'")
    return found


def metric(run: Run, name: str) -> list[tuple[int, float]]:
    """All points of a metric, in order: (images_seen, value)."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    history = client.get_metric_history(mlflow_run_of(run).info.run_id, name)
    return sorted((point.step, point.value) for point in history)


def assert_tracked_once(run: Run) -> None:
    """There is one finished MLflow run with one value per step and metric and each image once; the spool is empty."""
    found, client = mlflow_run_of(run), MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    assert found.info.status == "FINISHED"
    steps = list(range(320, TOTAL + 1, 320))
    for name in ("train/loss", "train/images_per_s", "system/cpu_utilization_percentage"):
        assert [step for step, _ in metric(run, name)] == steps, name
    pictures = [a.path for a in client.list_artifacts(found.info.run_id, "images") if a.path.endswith(".png")]
    assert len(pictures) == 5  # samples and denoising at two steps, and the final samples
    assert segments(run) == []


def segments(run: Run) -> list[str]:
    """Names of the segments that are still in the spool."""
    return files(run, "tracking")


def files(run: Run, folder: str) -> list[str]:
    """Names of the files in a folder of the run."""
    selector = locations.pafs.FileSelector(run.location.child(folder).path, allow_not_found=True)
    return sorted(info.base_name for info in run.location.filesystem.get_file_info(selector) if info.is_file)
