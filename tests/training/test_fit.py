"""Real Ray Train and Ray Data: a run with any number of workers equals a run in one process."""

import json
import math
import re
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import local, tracked
from support.processes import REPO, Background, Job, kill_tree, members, python_path, run, wait_for
from support.servers import RayHead

from ddpm.cluster import resources
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.reading import DataSet
from ddpm.runs import curves, run_folder, storage
from ddpm.runs import lock as driver_lock
from ddpm.runs.lock import DriverLock
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.push import Pushed
from ddpm.tracking.pusher import Delivery, Pusher
from ddpm.training import fit, loop
from ddpm.training.failures import TrainingFailed
from ddpm.training.monitor import StopSignals
from ddpm.training.runtime import Runtime
from ddpm.training.store import RunStore
from ddpm.utils.errors import UserError

FLAGS = """--data.window-rows 200 --schedule.num-timesteps 50 --model.base-width 8 --model.width-multipliers 1 2
    --model.norm-groups 4 --optim.lr 2e-3 --optim.lr-warmup-images 64 --train.batch-size 32 --train.micro-batch-size 8
    --train.log-every-images 64 --train.checkpoint-every-images 128 --train.sample-every-images 128
    --train.held-out-images 40 --sample.num-images 4 --sample.num-sample-steps 5
    --cluster.num-workers 1 --cluster.threads-per-worker 1""".split()
"""The fixture `tiny`, as flags."""
GRID = "samples/latest.png"


@pytest.fixture
def train_job(run_job: Callable[..., Any], digits_uri: str, tmp_path: Path) -> Callable[..., Any]:
    def train(name: str, *flags: str, total_images: int = 256, env: dict[str, str] | None = None) -> Any:
        where = ("--data.shards", digits_uri, "--run.name", name, "--run.storage", str(tmp_path / "runs"))
        total = ("--train.total-images", str(total_images))
        return run_job("train", "digits", *where, *total, *FLAGS, *flags, cwd=tmp_path, env=env)

    return train


def newest(tmp_path: Path, name: str) -> Path:
    return sorted((tmp_path / "runs" / name).glob("checkpoint-*"))[-1]


def assert_close(a: Path, b: Path) -> None:
    """Weights of workers, which sum gradients in another order."""
    first = local.stored(a)
    second = local.stored(b)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def without_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "with_workers", lambda config, began: config)
    monkeypatch.setattr(resources, "resources_per_worker", lambda config: {"CPU": 1.0})
    monkeypatch.setattr(resources, "check_storage", lambda config: None)
    monkeypatch.setattr(resources, "crowding", lambda config, per_worker: None)


def test_a_second_driver_of_a_run_is_rejected_before_it_writes(
    tiny: Config, train_set: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_cluster: None
) -> None:
    monkeypatch.setattr(driver_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(driver_lock, "PATIENCE_S", 4.0)
    config = override(tiny, {"run.name": "one", "run.storage": str(tmp_path / "runs")})
    with DriverLock(storage.resolve(str(tmp_path / "runs/one")), "run", "--run.name", print):
        with pytest.raises(UserError, match="another process drives this run"):
            fit.fit(config, train_set)
        assert [path.name for path in (tmp_path / "runs/one").iterdir()] == [driver_lock.FILE]


@pytest.mark.parametrize(
    ("uri", "server", "command"),
    [
        ("http://me:secret@mlflow:5000", "http://mlflow:5000", None),
        (None, "http://127.0.0.1:5000", "`mlflow ui` shows it at"),
        (
            "sqlite:////a b.db",
            "http://127.0.0.1:5000",
            "`mlflow ui --backend-store-uri 'sqlite:////a b.db'` shows it at",
        ),
    ],
)
def test_the_summary_links_to_the_page_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str | None, server: str, command: str | None
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if uri is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = run_folder.open_run("one", str(tmp_path))
    assert fit.summary(fit.Result(run, 64, None, None)) == []  # without tracking
    lines = fit.summary(fit.Result(run, 64, None, Delivery(Pushed(tracking_uri(), "7", "r", 0), True)))
    assert lines[-1].strip() == f"{server}/#/experiments/7/runs/r?workflowType=machine_learning"
    assert [line.strip() for line in lines[1:-1]] == ([command] if command else [])


class AfterASignal(StopSignals):
    """Stands for a monitor whose run was asked to stop, and then ended."""

    signal = signal.SIGTERM
    stop_requested = True

    def __init__(self, end: int | BaseException, ended_early: bool) -> None:
        self._end = end
        self.ended_early = ended_early

    def supervise(self) -> int:
        if isinstance(self._end, BaseException):
            raise self._end
        return self._end


@pytest.mark.parametrize(
    ("end", "ended_early", "status"),
    [
        (128, False, "STOPPED"),
        (128, True, "PRUNED"),
        (256, False, "FINISHED"),
        (KeyboardInterrupt(), False, "STOPPED"),
        (TrainingFailed("all workers died"), False, "FAILED"),
    ],
)
def test_how_a_run_that_was_asked_to_stop_ended(
    tiny: Config, tmp_path: Path, end: int | BaseException, ended_early: bool, status: str
) -> None:
    run = run_folder.open_run("one", str(tmp_path))
    run_folder.write_status(run.location, run_folder.Status(run_folder.RunStatus.RUNNING, 64, 0, 1.0))
    monitor: Any = AfterASignal(end, ended_early)
    with (
        nullcontext() if isinstance(end, int) else pytest.raises(type(end)),
        DriverLock(run.location, "run", "--run.name", print) as lock,
    ):
        fit._claim(run, lock)
        fit._drive(tiny, run, monitor, Pusher(run), lock)
    written = run_folder.read_status(run.location)
    assert written is not None and written.ended_ms is not None and written.ended_ms > 10**12
    assert (written.status, written.images_seen) == (status, end if isinstance(end, int) else 64)


def test_a_finished_run_whose_driver_was_killed_is_reported(
    tiny: Config, train_set: DataSet, tmp_path: Path, without_cluster: None
) -> None:
    config = override(tiny, {"run.name": "one", "run.storage": str(tmp_path)})
    run = run_folder.open_run("one", str(tmp_path))
    with local.finished(RunStore(config, run, train_set.rows.fingerprint)) as store:
        loop.train(config, Runtime(config, train_set, train_set.held_out(), store))
    assert run_folder.read_status(run.location).status == "RUNNING"  # type: ignore[union-attr]
    for _ in range(2):
        result = fit.fit(config, train_set)
        assert result.was_finished and result.delivery and result.delivery.is_complete
        status = run_folder.read_status(run.location)
        found = tracked.run_with_key(tracking_uri(), run.key).info
        assert status is not None and (status.status, found.status) == ("FINISHED",) * 2
        assert found.end_time == status.ended_ms


def test_a_folder_of_another_run_is_refused_unless_it_was_named(
    tiny: Config, train_set: DataSet, tmp_path: Path, without_cluster: None
) -> None:
    """It depends on the settings with which the run began, not on the name, or on whether it has a checkpoint."""
    config = override(tiny, {"run.name": "one", "run.storage": str(tmp_path)})
    began = run_folder.Facts(preset="digits", changed={"optim.lr": 0.5}, versions={"version.ddpm": "0.9"})
    run = run_folder.open_run("one", str(tmp_path), began)
    with local.finished(RunStore(config, run, train_set.rows.fingerprint)) as store:
        loop.train(config, Runtime(config, train_set, train_set.held_out(), store))
    for changed, is_named, refused in (
        ({"optim.lr": 0.5}, False, False),
        ({"optim.lr": 0.25}, True, False),
        ({"optim.lr": 0.25}, False, True),
    ):
        origin = fit.Origin("digits", changed, is_named)
        with pytest.raises(UserError, match=r"version 0\.9: optim\.lr 0\.5 ") if refused else nullcontext():
            assert fit.fit(config, train_set, origin).was_finished


@pytest.fixture
def recording_job(digits_uri: str, tmp_path: Path) -> Callable[..., Any]:
    def record(
        name: str, *flags: str, bad: tuple[str, ...] = (), env: Mapping[str, str] | None = None
    ) -> Any:
        """Run recording_job.py, which records micro-batches in the folder `name`; `bad`: RANK:STEP of NaN losses."""
        where = ("--data.shards", digits_uri, "--run.name", name, "--run.storage", str(tmp_path / "runs"))
        job = ("digits", *where, "--train.total-images", "256", *FLAGS, *flags)
        script = REPO / "tests/support/recording_job.py"
        words = (sys.executable, script, tmp_path / name, *bad, "--", *job)
        return run(words, cwd=tmp_path, env={**python_path(REPO / "tests"), **(env or {})})

    return record


@pytest.mark.oldest_ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("on_ray_head")
def test_any_number_of_workers_trains_the_same_as_one_process(
    recording_job: Callable[..., Any], tiny: Config, train_set: DataSet, tmp_path: Path
) -> None:
    """Images, noise, t and masks of every micro-batch are equal. With one worker the final weights are bitwise equal;
    with several, which sum gradients in another order, the weights and the sample grids are nearly equal."""
    local.fit(override(tiny, {"model.dropout": 0.2}), train_set, tmp_path / "local")
    expected = tmp_path / "local/checkpoint-000000000256-g1"
    grid = pixels(tmp_path / "local")
    seen = {}
    for workers in (1, 2, 3, 4):
        name = f"workers-{workers}"
        done = recording_job(name, "--cluster.num-workers", str(workers), "--model.dropout", "0.2")
        assert done.returncode == 0, done.stderr
        assert "256/256" in done.stdout and str(tmp_path / "runs" / name / GRID) in done.stdout
        assert "Traceback" not in done.stdout + done.stderr
        files = list((tmp_path / name).glob("*.jsonl"))
        assert len(files) == workers
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        seen[workers] = {(line["step"], line["index"]): line["digest"] for line in lines}
        assert len(seen[workers]) == len(lines)
        if workers == 1:
            local.assert_same(local.stored(newest(tmp_path, name)), local.stored(expected))
            continue
        assert_close(expected, newest(tmp_path, name))
        # Nearly the same images, in the same places of the grid.
        assert np.abs(pixels(tmp_path / "runs" / name) - grid).max() <= 2
    assert sorted(seen[1]) == [(step, index) for step in range(8) for index in range(4)]
    assert len(set(seen[1].values())) == 32
    assert seen[1] == seen[2] == seen[3] == seen[4]


def pixels(folder: Path) -> np.ndarray:
    """Pixels of a run's latest sample grid."""
    return np.asarray(Image.open(folder / GRID), int)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("on_ray_head")
def test_a_finished_run_can_be_extended(train_job: Callable[..., Any], tmp_path: Path) -> None:
    for total in (64, 128):
        done = train_job("longer", total_images=total)
        assert done.returncode == 0, done.stderr
        # With lr_schedule cosine the weights of a longer run differ from the start; order and noise are the same.
        state = json.loads((newest(tmp_path, "longer") / "state.json").read_text())
        assert (state["step"], state["images_seen"]) == (total // 32, total)
    again = train_job("longer", total_images=128)
    assert again.returncode == 0
    assert "run longer is finished: 128 images seen; nothing left to do" in again.stdout
    assert newest(tmp_path, "longer").name == "checkpoint-000000000128-g1"


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_non_finite_steps_are_skipped_on_all_ranks(
    recording_job: Callable[..., Any], tiny: Config, train_set: DataSet, tmp_path: Path
) -> None:
    """One rank's loss is NaN in step 3, the other's in step 5. If two steps may be skipped, the run finishes; if one,
    it fails and keeps the checkpoint before."""
    bad = ("1:3", "0:5")
    flags = ("--cluster.num-workers", "2", "--optim.skip-non-finite")
    done = recording_job("two", *flags, "2", bad=bad)
    assert done.returncode == 0, done.stderr
    assert json.loads((newest(tmp_path, "two") / "state.json").read_text())["skipped_steps"] == 2

    done = recording_job("one", *flags, "1", bad=bad)
    assert_error(done, "step 5 (160 images): ", 1)
    assert newest(tmp_path, "one").name == "checkpoint-000000000128-g1"
    assert all(torch.isfinite(tensor).all() for tensor in local.stored(newest(tmp_path, "one")).values())

    class NanLoss:
        """The reference in one process: the loss is NaN in steps 3 and 5."""

        def __init__(self, objective: Any) -> None:
            self._objective = objective
            self._calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._objective, name)

        def loss(self, model: Any, *args: Any) -> Any:
            loss = self._objective.loss(model, *args)
            self._calls += model.training
            return loss._replace(value=loss.value * (math.nan if self._calls - 1 in (3, 5) else 1))

    config = override(tiny, {"optim.skip_non_finite": 2})
    with pytest.MonkeyPatch.context() as patch:
        build = loop.build_objective
        patch.setattr(loop, "build_objective", lambda config: NanLoss(build(config)))
        local.fit(config, train_set, tmp_path / "local")
    assert_close(tmp_path / "local/checkpoint-000000000256-g1", newest(tmp_path, "two"))


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_what_was_recorded_before_a_non_finite_step_is_kept(
    recording_job: Callable[..., Any], tmp_path: Path
) -> None:
    """Rank 0 takes its time to write it; the other rank, which fails in the same step, does not leave before."""
    done = recording_job("two", "--cluster.num-workers", "2", bad=("1:6",), env={"FLUSH_AFTER_S": "3"})
    assert_error(done, "step 6 (192 images): ", 1)
    found = curves.read(storage.resolve(str(tmp_path / "runs/two")))
    assert [point.images_seen for point in found["train/loss"]] == [64, 128, 192]


def assert_error(done: Any, message: str, code: int) -> None:
    """The job failed with this exit code, a one-line error, and no traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("channels 3", "--model.channels 1"),
        (
            "image-size 16 --model.attention-resolutions 8",
            "model.image_size is 16",
        ),
        ("num-classes 7", "--model.num-classes 10"),
        ("net unet --data.split validation", "'validation'"),
    ],
)
def test_a_data_set_that_does_not_match_the_model_is_a_user_error(
    user_error: Callable[..., str], digits_uri: str, tmp_path: Path, flags: str, message: str
) -> None:
    words = ("--data.shards", digits_uri, *FLAGS, *f"--model.{flags}".split())
    assert message in user_error("train", "digits", *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_ctrl_c_before_the_first_step_exits_at_once(
    digits_uri: str, ray_head: RayHead, tmp_path: Path
) -> None:
    """The message mentions only files that exist, and the same command starts the run again."""
    cluster = ray_head.process.pid
    controller = "ray::TrainController"
    wait_for(lambda: not members(cluster, controller))  # of the test before
    where = ("--data.shards", digits_uri, "--run.name", "early", "--run.storage", str(tmp_path / "runs"))
    with Job("train", "digits", *where, *FLAGS, log=tmp_path / "job.log") as job:
        job.wait_for(lambda: members(cluster, controller))
        job.process.send_signal(signal.SIGINT)
        assert job.wait() == 128 + signal.SIGINT, job.output
    assert "stopped     at 0 images" in job.output
    assert "latest.png" not in job.output, job.output
    files = {path.name for path in (tmp_path / "runs/early").iterdir()}
    assert files <= {"run.json", "generations.json", "status.json"}


HOLD = """
import sys, time, ray

@ray.remote
def hold():
    print("held", flush=True)
    time.sleep(600)

ray.init()
ray.get(hold.options(num_cpus=ray.cluster_resources()["CPU"] - 0.5).remote())
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("on_ray_head")
def test_a_run_that_waits_for_cpus_says_so(digits_uri: str, tmp_path: Path) -> None:
    where = ("--data.shards", digits_uri, "--run.name", "waits", "--run.storage", str(tmp_path / "runs"))
    holder = Background((sys.executable, "-c", HOLD), log=tmp_path / "hold.log")
    words = ("digits", *where, *FLAGS, "--train.total-images", "256")
    with holder:
        holder.wait_for(lambda: "held" in holder.output)
        with Job("train", *words, log=tmp_path / "job.log") as job:
            job.wait_for(lambda: re.search(r"waiting     for 1 CPU: [\d.]+ of 3 in use", job.output))
            kill_tree(holder.process)
            assert job.wait() == 0, job.output
    assert "trained     256 images" in job.output
