"""Whatever dies, the run goes on, and ends with the tensors it would have ended with, bit for bit.

Every test kills something for real in a run of two workers, and compares with one run that nothing happened to.
"""

import json
import os
import random
import signal
import time
import urllib.request
from pathlib import Path

import processes
import pytest
from faulted import TOTAL, Run, assert_same, assert_tracked_once, metric, tracked
from mlflow import MlflowClient
from processes import REPO
from servers import RayHead

WORKER = "ray::RayTrainWorker"
CONTROLLER = "ray::TrainController"
SPLITTER = "ray::SplitCoordinator"
RUN_STATE = "ray::RunState"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.oldest_ray
def test_processes_killed_at_random_steps(run: Run, undisturbed: Run) -> None:
    """By itself the run goes on: two workers die, the coordinator of reading, and twice the actor between driver and
    workers, whose successor is told what was there."""
    dice = random.Random(0)
    titles = [RUN_STATE, WORKER, RUN_STATE, WORKER, SPLITTER]
    with run.start() as job:
        for title in titles:
            job.wait_for(run.past(run.position()))
            time.sleep(dice.uniform(0, 0.5))
            dice.choice(job.members(title)).send_signal(signal.SIGKILL)
        assert job.wait() == 0, job.output
    assert "Traceback" not in job.output
    assert job.output.count("failed; going on") == 3  # warnings that a new actor was told among them
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert 0.3 < metric(run, "train/goodput")[-1][1] <= 1  # a step is lost or none: chance has it


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


def test_asked_to_stop(run: Run, undisturbed: Run) -> None:
    """No step is lost: a checkpoint stands where the run was, and the same command goes on from there."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with run.start() as job:
            job.wait_for(run.past(run.position()))
            job.process.send_signal(number)
            assert job.wait() == code, job.output
        assert f"stopped     at {run.position():,} images" in job.output
        assert "Traceback" not in job.output
    with run.start() as job:
        assert job.wait() == 0, job.output
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert metric(run, "train/goodput")[-1] == (TOTAL, 1.0)


def test_the_clock_jumps(run: Run, undisturbed: Run, tmp_path: Path) -> None:
    """An hour forth and two back, in every Python process; and a worker that is killed resumes before it began."""
    clock = tmp_path / "clock"
    clock.write_text("0")
    env = {
        "CLOCK_OFFSET_FILE": str(clock),
        "PYTHONPATH": os.pathsep.join([str(REPO / "tests/jumping_clock"), os.environ.get("PYTHONPATH", "")]),
    }
    with run.start(env=env) as job:
        for offset_s in (3600, -3600):
            job.wait_for(run.past(run.position()))
            clock.write_text(str(offset_s))
        job.wait_for(run.past(run.position() + 640))
        job.members(WORKER)[0].send_signal(signal.SIGKILL)
        job.wait_for(run.past(run.position()))
        clock.write_text("0")
        assert job.wait() == 0, job.output
    assert "Traceback" not in job.output
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    history = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(
        tracked(run).info.run_id, "train/loss"
    )
    times = [point.timestamp for point in history]
    assert max(times) - min(times) > 3_600_000, "the clock was never another one"


@pytest.mark.oldest_ray
def test_ray_job_stop(run: Run, undisturbed: Run, ray_head: RayHead) -> None:
    """Three seconds are enough for a checkpoint; the job submitted again goes on at the very step."""
    command = ("python", "jobs/train.py", *run.arguments)
    env = {"MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"], "OMP_NUM_THREADS": "2"}
    ray_head.submit(*command, env=env, options=("--no-wait", "--submission-id", "stopped"))
    deadline = time.monotonic() + 120
    while run.position() == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    before = run.position()
    ray_head.stop_job("stopped")
    assert TOTAL > run.position() > before > 0
    done = ray_head.submit(*command, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert metric(run, "train/goodput")[-1] == (TOTAL, 1.0)
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
