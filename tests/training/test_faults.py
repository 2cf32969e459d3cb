"""Whatever process is killed, the run continues, and its final tensors are bitwise those of an undisturbed run.

Each test really kills processes of a run of two workers, and compares it with an undisturbed run.
"""

import json
import os
import random
import re
import shutil
import signal
import time
import urllib.request
from functools import partial
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from ray.job_submission import JobSubmissionClient
from support import local, processes
from support.checkpoints import checkpoint_name
from support.faulted import (
    TOTAL,
    Run,
    assert_recovered,
    assert_same,
    assert_tracked_once,
    metric,
    mlflow_run_of,
)
from support.processes import REPO
from support.servers import RayHead

from ddpm.runs import run_folder
from ddpm.runs.run_folder import CheckpointName
from ddpm.training import failures

WORKER = "ray::RayTrainWorker"
CONTROLLER = "ray::TrainController"
SPLITTER = "ray::SplitCoordinator"
RUN_STATE = "ray::RunState"
RESTARTS = "failed; resuming"
"""Part of the line with which each restart begins."""
GIB = 1 << 30

pytestmark = pytest.mark.slow


@pytest.mark.long
@pytest.mark.oldest_ray
def test_killed_processes_and_changed_clocks(run: Run, undisturbed: Run, tmp_path: Path) -> None:
    """The run continues by itself after kills of two workers, of the split coordinator, and twice of the RunState
    actor. Meanwhile the clock of every Python process jumps an hour ahead,
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
            job.wait_for(run.past(run.images_seen()))
            num_restarts = job.output.count(RESTARTS)
            clock.write_text(str(offset_s))
            time.sleep(rng.uniform(0, 0.3))
            members = job.wait_for(partial(job.members, title))  # a group may just start again
            rng.choice(members).send_signal(signal.SIGKILL)
            job.wait_for(lambda before=num_restarts: job.output.count(RESTARTS) > before)
        job.wait_for(run.past(run.images_seen()))
        clock.write_text("0")
        assert job.wait() == 0, job.output
    assert job.output.count(RESTARTS) == 5
    assert_recovered(run, undisturbed, job)
    assert all(0.3 < goodput < 1 for _, goodput in metric(run, "train/goodput"))  # at most one step is lost
    history = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(
        mlflow_run_of(run).info.run_id, "train/loss"
    )
    times = [point.timestamp for point in history]
    assert max(times) - min(times) > 3_600_000, "the clock was never another one"


@pytest.mark.usefixtures("on_ray_head")
def test_the_run_state_actor_is_killed(run: Run, undisturbed: Run, ray_head: RayHead) -> None:
    """Before the first step, during training, and when the last checkpoint has just been stored."""
    cluster = ray_head.process.pid
    processes.wait_for(lambda: not processes.members(cluster, WORKER))  # of the test before
    with run.start() as job:
        job.wait_for(lambda: processes.members(cluster, WORKER))
        kill_run_state(cluster)
        job.wait_for(run.past(1280))
        kill_run_state(cluster)
        job.wait_for(run.past(TOTAL - 1))
        kill_run_state(cluster)
        assert job.wait() == 0, job.output
    assert job.output.count(f"{failures.STATE} failed; resuming") >= 2  # the last one may be too late
    assert_recovered(run, undisturbed, job)


def kill_run_state(cluster: int) -> None:
    for process in processes.members(cluster, RUN_STATE):
        process.send_signal(signal.SIGKILL)


def test_controller_driver_and_cluster_killed(run: Run, undisturbed: Run) -> None:
    """When the controller is killed, the job starts another one. When the driver, and then all processes of the
    cluster, are killed, the same command resumes the run."""
    with run.start() as job:
        job.wait_for(run.past(0))
        (controller,) = job.members(CONTROLLER)
        controller.send_signal(signal.SIGKILL)
        job.wait_for(run.past(run.images_seen() + 640))
        orphans = job.members(WORKER)
        assert len(orphans) == 2
        job.process.send_signal(signal.SIGKILL)
        job.process.wait()
        again = run.start()  # at once, while processes of the first cluster still run
    with again as job:
        job.wait_for(run.past(run.images_seen()))
        assert not any(orphan.is_running() for orphan in orphans)
        processes.kill_tree(job.process)
    with run.start() as job:
        assert job.wait() == 0, job.output
    assert_same(run, undisturbed)
    assert_tracked_once(run)


@pytest.mark.long
def test_a_killed_worker_of_three(digits_uri: str, tmp_path: Path) -> None:
    """Three workers share four micro-batches; after a kill the weights are bitwise those of a run of three without."""
    flags = ("--cluster.num-workers", "3", "--cluster.cpus-per-worker", "0.3", "--train.total-images", "3840")
    three, killed = (
        Run(name, str(tmp_path), digits_uri, tmp_path / f"{name}.log") for name in ("three", "killed")
    )
    with killed.start(*flags) as job:
        job.wait_for(killed.past(0))
        random.Random(0).choice(job.members(WORKER)).send_signal(signal.SIGKILL)
        assert job.wait() == 0, job.output
    assert job.output.count("failed; resuming") == 1
    with three.start(*flags) as job:
        assert job.wait() == 0, job.output
    local.assert_same(killed.tensors(3840), three.tensors(3840))


@pytest.mark.usefixtures("on_ray_head")
def test_a_stopped_run_resumes_and_skips_a_damaged_checkpoint(run: Run, undisturbed: Run) -> None:
    """Stopping loses no step: the run writes a checkpoint, and the same command resumes from it. If the newest
    checkpoint is damaged, the run resumes from the previous one; if all are, it does not start from scratch."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
        with run.start() as job:
            job.wait_for(run.past(run.images_seen()))
            job.process.send_signal(number)
            assert job.wait() == code, job.output
        assert f"stopped     at {run.images_seen():,} images" in job.output
        assert_status(run, "STOPPED")
        assert "Traceback" not in job.output
    before, newest = sorted(Path(run.location.path).glob("checkpoint-*"))[-2:]
    named = CheckpointName.parse(before.name)
    assert named is not None
    incomplete = newest.with_name(checkpoint_name(6000))
    incomplete.mkdir()
    shutil.copy(newest / "net.safetensors", incomplete)
    flip_bit(newest / "ema.safetensors")
    with run.start() as job:
        assert job.wait() == 0, job.output
    assert f"{newest.name} is not valid" in job.output
    assert f"{newest.name}/ema.safetensors is damaged" in job.output
    assert_status(run, "FINISHED")
    assert not incomplete.exists()
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert all(step > named.images_seen for step, _ in metric(run, "train/goodput"))  # stopping lost no step
    for file in Path(run.location.path).glob("checkpoint-*/net.safetensors"):
        flip_bit(file)
    with run.start() as job:
        assert job.wait() == 2
    assert f"error: every checkpoint of {run.location.uri} is damaged" in job.output


def assert_status(run: Run, status: str) -> None:
    """status.json says how the run stands."""
    found = run_folder.read_status(run.location)
    assert found is not None and found.status == status and found.ended_ms is not None
    assert "cores" in found.hardware and found.images_seen == run.images_seen()


@pytest.mark.long
def test_a_closed_terminal_stops_a_run_with_a_checkpoint(run: Run, undisturbed: Run) -> None:
    """SIGHUP reaches all processes of the session, also those of the cluster that the job has started."""
    with run.start() as job:
        job.wait_for(run.past(0))
        os.killpg(job.process.pid, signal.SIGHUP)
        assert job.wait() == 129, job.output
    assert f"stopped     at {run.images_seen():,} images" in job.output
    with run.start() as job:
        assert job.wait() == 0, job.output
    assert_same(run, undisturbed)
    assert metric(run, "train/goodput") == []  # no step was lost


def flip_bit(file: Path) -> None:
    """Flip one bit of a file."""
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)


@pytest.mark.nightly
def test_a_submitted_job_is_stopped_and_submitted_again(
    digits_uri: str,
    undisturbed: Run,
    ray_head: RayHead,
    mlflow_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The seconds before SIGKILL (ten here, three by default) are enough for a checkpoint, so the run resumes at the
    same step; also if no storage is named, and the installed program resumes it, without a checkout."""
    run = Run("submitted", str(tmp_path / "ddpm/runs"), digits_uri, tmp_path / "job.log")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    command = ("python", "jobs/train.py", *run.arguments)
    at = command.index("--run.storage")
    command = (*command[:at], *command[at + 2 :])
    env = {"MLFLOW_TRACKING_URI": mlflow_server, "OMP_NUM_THREADS": "2", "HOME": str(tmp_path)}
    checkout = processes.write_checkout(tmp_path / "checkout")
    client = JobSubmissionClient(ray_head.dashboard)
    no_wait = ("--no-wait", "--submission-id", "stopped")
    ray_head.submit(*command, env=env, cwd=checkout, options=no_wait)
    before = processes.wait_for(run.images_seen)
    client.stop_job("stopped")  # as `ray job stop`, which starts slowly: SIGTERM, and later SIGKILL
    processes.wait_for(lambda: client.get_job_status("stopped").is_terminal())
    assert TOTAL > run.images_seen() > before > 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/notes.txt").write_text("no checkout")
    done = ray_head.submit("ddpm", "train", *command[2:], env=env, cwd=tmp_path / "notes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"folder      {tmp_path}/ddpm: relative paths start here" in done.stdout
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


@pytest.mark.long
def test_processes_killed_by_the_memory_monitor(run: Run, undisturbed: Run) -> None:
    """Ray's memory monitor kills processes while this test fills the memory; then the run continues by itself."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + 6 * GIB) / memory.total  # other tests may take 3
    limits = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    line = "out of memory: "
    ballast = []
    with run.start(env=limits) as job:
        job.wait_for(run.past(0))
        workers = job.members(WORKER)
        with processes.paused(workers):  # so that the run does not finish before
            while line not in job.output and all(worker.is_running() for worker in workers):
                assert job.process.poll() is None, job.output
                if psutil.virtual_memory().available > GIB and len(ballast) < 40:
                    ballast.append(b"1" * (GIB // 4))
                time.sleep(0.2)
        ballast.clear()
        job.wait_for(lambda: line in job.output)
        assert job.wait() == 0, job.output
    assert_recovered(run, undisturbed, job)


def test_memory_that_is_always_full_is_one_error(run: Run) -> None:
    limits = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    with run.start(env=limits) as job:
        assert job.wait() == 1, job.output
    assert job.output.count("failed; resuming from the last checkpoint: out of memory: ") == 3
    (error,) = re.findall("^error: .*", job.output, re.MULTILINE)
    assert "out of memory: " in error and "--train.forward-images" in error and "4 times" in error
    assert "Traceback" not in job.output and "Refer to" not in job.output
    found = run_folder.read_status(run.location)
    assert found is not None and found.status == "FAILED" and found.ended_ms is not None
