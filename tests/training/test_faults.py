"""Whatever process is killed, the run continues, and its final tensors are bitwise those of an undisturbed run.

Each test really kills processes of a run of two workers, and compares it with an undisturbed run.
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
from support.faulted import TOTAL, Run, assert_same, assert_tracked_once, metric, mlflow_run_of
from support.processes import REPO
from support.servers import RayHead

WORKER = "ray::RayTrainWorker"
CONTROLLER = "ray::TrainController"
SPLITTER = "ray::SplitCoordinator"
RUN_STATE = "ray::RunState"

pytestmark = pytest.mark.slow


@pytest.mark.oldest_ray
def test_killed_processes_and_changed_clocks(run: Run, undisturbed: Run, tmp_path: Path) -> None:
    """The run continues by itself after kills of two workers, of the split coordinator, and twice of the RunState
    actor, whose replacement gets its state again. Meanwhile the clock of every Python process jumps an hour ahead,
    then two hours back: a killed worker then resumes before the time it had started."""
    clock = tmp_path / "clock"
    clock.write_text("0")
    env = {"CLOCK_OFFSET_FILE": str(clock), **processes.python_path(REPO / "tests/support/jumping_clock")}
    rng = random.Random(0)
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
            time.sleep(rng.uniform(0, 0.3))
            rng.choice(job.members(title)).send_signal(signal.SIGKILL)
        job.wait_for(run.past(run.position()))
        clock.write_text("0")
        assert job.wait() == 0, job.output
    assert "Traceback" not in job.output
    # Including the warnings that a new RunState actor receives again.
    assert job.output.count("failed; resuming") == 3
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert all(0.3 < goodput < 1 for _, goodput in metric(run, "train/goodput"))  # at most one step is lost
    history = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(
        mlflow_run_of(run).info.run_id, "train/loss"
    )
    times = [point.timestamp for point in history]
    assert max(times) - min(times) > 3_600_000, "the clock was never another one"


def test_controller_driver_and_cluster_killed(run: Run, undisturbed: Run) -> None:
    """When the controller is killed, the job starts another one. When the driver, and then all processes of the
    cluster, are killed, the same command resumes the run."""
    with run.start() as job:
        job.wait_for(run.past(0))
        (controller,) = job.members(CONTROLLER)
        controller.send_signal(signal.SIGKILL)
        job.wait_for(run.past(run.position() + 640))
        orphans = job.members(WORKER)
        assert len(orphans) == 2
        job.process.send_signal(signal.SIGKILL)
        job.process.wait()
        again = run.start()  # at once, while processes of the first cluster still run
    with again as job:
        job.wait_for(run.past(run.position()))
        assert not any(orphan.is_running() for orphan in orphans)
        processes.kill_tree(job.process)
    with run.start() as job:
        assert job.wait() == 0, job.output
    assert_same(run, undisturbed)
    assert_tracked_once(run)


@pytest.mark.usefixtures("on_ray_head")
def test_a_stopped_run_resumes_and_skips_a_damaged_checkpoint(run: Run, undisturbed: Run) -> None:
    """Stopping loses no step: the run writes a checkpoint, and the same command resumes from it. If the newest
    checkpoint is damaged, the run resumes from the previous one; if all are, it does not start from scratch."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with run.start() as job:
            job.wait_for(run.past(run.position()))
            job.process.send_signal(number)
            assert job.wait() == code, job.output
        assert f"stopped     at {run.position():,} images" in job.output
        assert "Traceback" not in job.output
    before, newest = sorted(Path(run.location.path).glob("checkpoint-*"))[-2:]
    whole = int(before.name.rpartition("-")[2])
    incomplete = newest.with_name("checkpoint-000000006000")
    incomplete.mkdir()
    shutil.copy(newest / "net.safetensors", incomplete)
    flip_bit(newest / "ema.safetensors")
    with run.start() as job:
        assert job.wait() == 0, job.output
    assert f"{newest.name} is not valid, so the one before it is tried" in job.output
    assert f"{newest.name}/ema.safetensors is damaged" in job.output
    assert not incomplete.exists()
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert all(step > whole for step, _ in metric(run, "train/goodput"))  # stopping lost no step
    for file in Path(run.location.path).glob("checkpoint-*/net.safetensors"):
        flip_bit(file)
    with run.start() as job:
        assert job.wait() == 2
    assert f"error: every checkpoint of {run.location.uri} is damaged" in job.output


def flip_bit(file: Path) -> None:
    """Flip one bit of a file."""
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
    """The three seconds before SIGKILL are enough for a checkpoint, so the run resumes at the same step."""
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
    assert metric(run, "train/goodput") == []  # no step was lost
    found = mlflow_run_of(run)
    assert found.data.params["cluster.num_workers"] == "2"
    files = MlflowClient(mlflow_server).list_artifacts(found.info.run_id, "pictures")
    plots = ("forward_noising.png", "reverse_trajectory.png", "reverse_trajectory.gif")
    assert {Path(file.path).name for file in files} == {*plots}
    assert_ray_shows(ray_head, run)


def assert_ray_shows(ray_head: RayHead, run: Run) -> None:
    """Ray's API and its Prometheus metrics, on which its dashboards are built, show the run."""
    name = Path(run.location.path).name
    with urllib.request.urlopen(f"{ray_head.dashboard}/api/train/v2/runs/v1") as answer:
        found = [entry for entry in json.load(answer)["train_runs"] if entry["name"] == name]
    # The driver of a stopped job may exit before Ray has noticed that its workers are gone.
    assert sorted(entry["status"] for entry in found) in (["ABORTED", "FINISHED"], ["FINISHED"] * 2)
    assert all(len(entry["attempts"][-1]["workers"]) == 2 for entry in found)
    with urllib.request.urlopen(f"{ray_head.metrics}/metrics") as answer:
        assert f'ray_train_run_name="{name}"' in answer.read().decode()
