"""Whatever dies, the run goes on, and ends with the tensors it would have ended with, bit for bit.

Every test kills something for real in a run of two workers, and compares with one run that nothing happened to.
"""

import json
import os
import random
import shutil
import signal
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support import processes
from support.faulted import TOTAL, Run, assert_same, assert_tracked_once, metric, tracked
from support.processes import REPO
from support.servers import RayHead

WORKER = "ray::RayTrainWorker"
CONTROLLER = "ray::TrainController"
SPLITTER = "ray::SplitCoordinator"
RUN_STATE = "ray::RunState"

pytestmark = pytest.mark.slow


@pytest.mark.oldest_ray
def test_processes_killed_and_clocks_set(run: Run, undisturbed: Run, tmp_path: Path) -> None:
    """By itself the run goes on: two workers die, the coordinator of reading, and twice the actor between driver and
    workers, whose successor is told what was there. The clock of every Python process goes an hour forth, then two
    back; a worker that is killed then resumes before it began."""
    clock = tmp_path / "clock"
    clock.write_text("0")
    env = {"CLOCK_OFFSET_FILE": str(clock), **processes.python_path(REPO / "tests/support/jumping_clock")}
    dice = random.Random(0)
    with run.start(env=env) as job:
        for title, offset_s in (
            (RUN_STATE, 0),
            (WORKER, 3600),
            (RUN_STATE, 3600),
            (WORKER, -3600),
            (SPLITTER, -3600),
        ):
            job.wait_for(run.past(run.position()))
            clock.write_text(str(offset_s))
            time.sleep(dice.uniform(0, 0.3))
            dice.choice(job.members(title)).send_signal(signal.SIGKILL)
        job.wait_for(run.past(run.position()))
        clock.write_text("0")
        assert job.wait() == 0, job.output
    assert "Traceback" not in job.output
    assert job.output.count("failed; resuming") == 3  # warnings that a new actor was told among them
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert all(0.3 < goodput < 1 for _, goodput in metric(run, "train/goodput"))  # a step is lost or none
    history = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(
        tracked(run).info.run_id, "train/loss"
    )
    times = [point.timestamp for point in history]
    assert max(times) - min(times) > 3_600_000, "the clock was never another one"


def test_controller_driver_and_cluster_killed(run: Run, undisturbed: Run) -> None:
    """The controller dies: the job starts another. The driver dies, then every process of the cluster: the same
    command goes on."""
    with run.start() as job:
        job.wait_for(run.past(0))
        (controller,) = job.members(CONTROLLER)
        controller.send_signal(signal.SIGKILL)
        job.wait_for(run.past(run.position() + 640))
        orphans = job.members(WORKER)
        assert len(orphans) == 2
        job.process.send_signal(signal.SIGKILL)
        job.process.wait()
        again = run.start()  # at once: whoever is left of the first cluster is still about
    with again as job:
        job.wait_for(run.past(run.position()))
        assert not any(orphan.is_running() for orphan in orphans)
        processes.kill_tree(job.process)
    with run.start() as job:
        assert job.wait() == 0, job.output
    assert_same(run, undisturbed)
    assert_tracked_once(run)


@pytest.mark.usefixtures("on_ray_head")
def test_asked_to_stop_and_then_damaged(run: Run, undisturbed: Run) -> None:
    """No step is lost: a checkpoint stands where the run was, and the same command goes on from there. When a byte of
    the newest one has flipped, it goes on from the one before; when no checkpoint is whole, it does not begin anew."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with run.start() as job:
            job.wait_for(run.past(run.position()))
            job.process.send_signal(number)
            assert job.wait() == code, job.output
        assert f"stopped     at {run.position():,} images" in job.output
        assert "Traceback" not in job.output
    before, newest = sorted(Path(run.location.path).glob("checkpoint-*"))[-2:]
    whole = int(before.name.rpartition("-")[2])
    half = newest.with_name("checkpoint-000000006000")
    half.mkdir()
    shutil.copy(newest / "net.safetensors", half)
    flip(newest / "ema.safetensors")
    with run.start() as job:
        assert job.wait() == 0, job.output
    assert f"{newest.name} is not valid, so the one before it is tried" in job.output
    assert f"{newest.name}/ema.safetensors is damaged" in job.output
    assert not half.exists()
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert all(
        step > whole for step, _ in metric(run, "train/goodput")
    )  # by being asked to stop, nothing was lost
    for file in Path(run.location.path).glob("checkpoint-*/net.safetensors"):
        flip(file)
    with run.start() as job:
        assert job.wait() == 2
    assert f"error: every checkpoint of {run.location.uri} is damaged" in job.output


def flip(file: Path) -> None:
    """A bit of it."""
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)


@pytest.mark.oldest_ray
def test_a_submitted_job_is_stopped_and_submitted_again(
    digits_uri: str,
    undisturbed: Run,
    ray_head: RayHead,
    mlflow_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three seconds are enough for a checkpoint, and the run goes on at the very step."""
    run = Run("submitted", str(tmp_path / "runs"), digits_uri, tmp_path / "job.log")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    command = ("python", "jobs/train.py", *run.arguments)
    env = {"MLFLOW_TRACKING_URI": mlflow_server, "OMP_NUM_THREADS": "2"}
    client = ray_head.job_client()
    ray_head.submit(*command, env=env, options=("--no-wait", "--submission-id", "stopped"))
    before = processes.wait_for(run.position)
    ray_head.stop_job(client, "stopped")
    assert TOTAL > run.position() > before > 0
    done = ray_head.submit(*command, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{TOTAL:,}/{TOTAL:,}" in done.stdout
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert metric(run, "train/goodput") == []  # nothing was lost
    found = tracked(run)
    assert found.data.params["cluster.num_workers"] == "2"
    files = MlflowClient(mlflow_server).list_artifacts(found.info.run_id, "pictures")
    pictures = ("forward_noising.png", "reverse_trajectory.png", "reverse_trajectory.gif")
    assert {Path(file.path).name for file in files} == {*pictures}
    assert_ray_sees(ray_head, run)


def assert_ray_sees(ray_head: RayHead, run: Run) -> None:
    """Ray's API and its Prometheus metrics show the run, as the pages that are built on them do."""
    name = Path(run.location.path).name
    with urllib.request.urlopen(f"{ray_head.dashboard}/api/train/v2/runs/v1") as answer:
        found = [shown for shown in json.load(answer)["train_runs"] if shown["name"] == name]
    # The driver of a job that was stopped may be gone before Ray has seen its workers leave.
    assert sorted(shown["status"] for shown in found) in (["ABORTED", "FINISHED"], ["FINISHED"] * 2)
    assert all(len(shown["attempts"][-1]["workers"]) == 2 for shown in found)
    with urllib.request.urlopen(f"{ray_head.metrics}/metrics") as answer:
        assert f'ray_train_run_name="{name}"' in answer.read().decode()
