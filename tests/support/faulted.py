"""A run of two workers for fault-injection tests, and the comparison of its final state with an undisturbed run."""

import os
from collections.abc import Callable
from pathlib import Path

import mlflow.entities
import numpy as np
import torch
from sklearn.datasets import load_digits

from ddpm.data.manifest import Shard, make_manifest, write_manifest
from ddpm.data.shards import write_shard
from ddpm.runs import curves, names, run_folder, storage
from ddpm.runs.run_folder import CheckpointName
from ddpm.tracking import mlflow_pages
from ddpm.utils.images import time_ms_of
from support import local, processes, tracked

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
        self.location = storage.resolve(uri).child(name)
        self._log = log
        self.arguments = ["digits", "--data.shards", data, "--run.name", name, "--run.storage", uri, *FLAGS]

    def start(self, *flags: str, env: dict[str, str] | None = None) -> processes.Job:
        return processes.Job("train", *self.arguments, *flags, log=self._log, env=env)

    def images_seen(self) -> int:
        """Images seen at the newest checkpoint; 0 if there is none."""
        found = run_folder.checkpoints(self.location)
        name = CheckpointName.parse(Path(found[-1].path).name) if found else None
        return 0 if name is None else name.images_seen

    def past(self, images_seen: int) -> Callable[[], bool]:
        return lambda: self.images_seen() > images_seen

    def tensors(self, total: int = TOTAL) -> dict[str, torch.Tensor]:
        """Tensors of the last checkpoint, which must be at `total` images."""
        assert self.images_seen() == total
        with names.local_checkpoint(self.location.uri) as folder:
            return local.stored(folder)


def write_digits(folder: Path) -> str:
    """Write scikit-learn's digits as shards (600 training images in two shards, 60 held out); returns their URI."""
    location = storage.resolve(str(folder))
    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)

    def write(path: str, first: int, last: int) -> Shard:
        part = slice(first, last)
        return write_shard(location, path, images[part], labels[part], rows_per_row_group=100)

    shards = {
        "train": [write("train/00000.parquet", 0, 350), write("train/00001.parquet", 350, 600)],
        "test": [write("test/00000.parquet", 600, 660)],
    }
    classes = [str(i) for i in range(10)]
    manifest = make_manifest("digits", (8, 8, 1), "raw", classes, shards, options="test")
    write_manifest(location, manifest)
    return location.uri


def assert_same(run: Run, undisturbed: Run) -> None:
    """The final tensors are bitwise equal, and so are all curves that do not depend on time."""
    timed = ("train/images_per_s", "train/data_wait_share", "train/goodput")

    def values(run: Run) -> dict[tuple[str, int], float]:
        kept = {
            name: curve for name, curve in curves.read(run.location).items() if not name.startswith(timed)
        }
        return {(name, point.images_seen): point.value for name, curve in kept.items() for point in curve}

    ours = values(run)
    assert ours == values(undisturbed) and ("train/loss_t_quarter_1", TOTAL) in ours
    local.assert_same(run.tensors(), undisturbed.tensors())


def mlflow_run_of(run: Run) -> mlflow.entities.Run:
    """The run's only MLflow run."""
    return tracked.run_with_key(os.environ["MLFLOW_TRACKING_URI"], run_folder.read_card(run.location).run_key)


def metric(run: Run, name: str) -> list[tuple[int, float]]:
    """All points of a metric, in order: (images_seen, value)."""
    return tracked.history(os.environ["MLFLOW_TRACKING_URI"], mlflow_run_of(run), name)


def assert_tracked_once(run: Run) -> None:
    """One finished MLflow run has what the run's folder has, each point and each picture once."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    found = mlflow_run_of(run)
    name = run.location.uri.rpartition("/")[2]
    content = tracked.content(
        uri, run_folder.RunFolder(name, run.location, run_folder.read_card(run.location).run_key)
    )
    status = run_folder.read_status(run.location)
    assert status is not None and status.status == content["status"] == "FINISHED"
    assert found.info.end_time == status.ended_ms
    points = {
        name: [(point.images_seen, point.timestamp_ms, repr(point.value)) for point in curve]
        for name, curve in curves.read(run.location).items()
    }
    assert content["metrics"] == points
    every = list(range(320, TOTAL + 1, 320))
    for name in ("train/loss", "train/images_per_s"):
        assert [step for step, _, _ in points[name]] == every, name
    table = curves.read_rows(run.location)
    assert table.num_rows == sum(map(len, points.values())), "a point is recorded twice"
    expected = []
    for series in (run_folder.SAMPLES, run_folder.DENOISING):
        for step, file in run_folder.pictures(run.location, series).items():
            expected += [(series, step, time_ms_of(file.read()), kind) for kind in ("png", "webp")]
    pictures = tracked.pictures_in(content["artifacts"])
    assert [picture for picture in pictures if picture[0] != mlflow_pages.LAST_GRID] == sorted(expected)
    assert len(expected) == 8  # two steps
    assert len(pictures) == 10  # and the last grid
    folder = run.location.child(run_folder.PICTURES)
    finals = {f"{run_folder.PICTURES}/{name}": folder.child(name).read() for name in folder.files()}
    assert len(finals) == 3 and finals.items() <= content["artifacts"].items()


def assert_recovered(run: Run, undisturbed: Run, job: processes.Job) -> None:
    """The job printed no traceback, and the run ended as the undisturbed one, in storage and in MLflow."""
    assert "Traceback" not in job.output
    assert_same(run, undisturbed)
    assert_tracked_once(run)


def only_error(job: processes.Job) -> str:
    """The one line of a job's error, without a traceback."""
    assert "Traceback" not in job.output
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    return line
