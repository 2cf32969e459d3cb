"""Storage faults, outages and full disks: an incomplete checkpoint is never loaded, and the run continues or fails
with one clear error.

The S3 server is real, behind a proxy that injects faults; the full disk is a small tmpfs.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faulted import Run, assert_recovered, assert_same, assert_tracked_once, metric, only_error
from support.processes import Job
from support.proxy import FaultyProxy
from support.servers import S3Server

from ddpm.runs import checkpoint, names, storage

WORKER = "ray::RayTrainWorker"
READER = "ray::MapBatches(_ReadTask)"

pytestmark = pytest.mark.slow


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def run_on_s3(s3_bucket: str, digits_uri: str, tmp_path: Path) -> Run:
    """Data set and run in a bucket."""
    data = storage.resolve(f"{s3_bucket}/data")
    storage.pafs.copy_files(digits_uri, data.path, destination_filesystem=data.filesystem)
    return Run("harmed", f"{s3_bucket}/runs", data.uri, tmp_path / "job.log")


def env_through(proxy: FaultyProxy) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": proxy.endpoint}


def kill_workers(job: Job) -> None:
    for worker in job.members(WORKER):
        worker.send_signal(signal.SIGKILL)


def test_workers_killed_during_a_checkpoint_upload(
    run_on_s3: Run, undisturbed: Run, proxy: FaultyProxy
) -> None:
    """Workers are killed in the middle of an upload; before the checksums, which complete a checkpoint, are uploaded;
    and between two checkpoints."""
    moments = [
        r"checkpoint-000000001280-g\d+/ema.safetensors",
        r"checkpoint-000000002560-g\d+/checksums.json",
    ]
    reached = []
    with run_on_s3.start(env=env_through(proxy)) as job:
        for moment in moments:
            proxy.on_request(f"^PUT .*{moment}", lambda: kill_workers(job))
            job.wait_for(lambda: not proxy.is_armed)
            reached.append(run_on_s3.images_seen())
        job.wait_for(run_on_s3.past(3200))
        kill_workers(job)
        assert job.wait() == 0, job.output
    assert reached == [640, 1920]  # an incomplete upload does not count as a checkpoint
    assert_same(run_on_s3, undisturbed)
    assert_tracked_once(run_on_s3)
    assert 0.3 < metric(run_on_s3, "train/goodput")[-1][1] < 1


def test_s3_faults_and_killed_read_tasks_cause_no_failure(
    run_on_s3: Run, undisturbed: Run, proxy: FaultyProxy
) -> None:
    """Read tasks are killed during a request; then come resets, 503s, delays, and 10 s of outage: the images and their
    order are the same, and Ray Train counts no failure."""
    killed = []

    def kill_read_tasks() -> None:
        for reader in job.members(READER):
            reader.send_signal(signal.SIGKILL)
            killed.append(reader.pid)

    with run_on_s3.start("--cluster.max-failures", "0", env=env_through(proxy)) as job:
        while len(killed) < 3:
            proxy.on_request("^GET .*/train/", kill_read_tasks)
            job.wait_for(lambda: not proxy.is_armed)
        for mode, every in (("reset", 3), ("slow_down", 3), ("delay", 3)):
            proxy.switch(mode, every=every, delay_s=1)
            job.wait_for(run_on_s3.past(run_on_s3.images_seen()))
        proxy.switch("down")
        time.sleep(10)
        proxy.switch("pass")
        assert job.wait() == 0, job.output
    assert_recovered(run_on_s3, undisturbed, job)


@pytest.mark.long
def test_slow_s3_causes_no_failure(run_on_s3: Run, undisturbed: Run, proxy: FaultyProxy) -> None:
    """A checkpoint interval with two seconds per request is no failure, even with a small --run.storage-timeout-s."""
    flags = ("--cluster.max-failures", "0", "--run.storage-timeout-s", "5")
    with run_on_s3.start(*flags, env=env_through(proxy)) as job:
        job.wait_for(run_on_s3.past(0))
        proxy.switch("delay", delay_s=2)
        before = run_on_s3.images_seen()
        job.wait_for(run_on_s3.past(before + 640))  # + 640: one upload may already have been running
        proxy.switch("pass")
        assert job.wait() == 0, job.output
    assert "warning" not in job.output
    assert_recovered(run_on_s3, undisturbed, job)


def test_s3_down_for_good_is_one_error(run_on_s3: Run, proxy: FaultyProxy) -> None:
    """The run ends with one clear error, within the time-out in the config; the last checkpoint is valid."""
    with run_on_s3.start("--run.storage-timeout-s", "5", env=env_through(proxy)) as job:
        job.wait_for(run_on_s3.past(0))
        proxy.switch("down")
        assert job.wait() == 1, job.output
    error = only_error(job)
    assert run_on_s3.location.path.partition("/")[0] in error  # the bucket's name
    assert "--run.storage-timeout-s 5" in error and "its last answer: " in error
    with names.local_checkpoint(run_on_s3.location.uri) as folder:
        checkpoint.verify(folder)


@pytest.mark.usefixtures("on_ray_head")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_is_one_error(digits_uri: str, tmp_path: Path) -> None:
    """The run ends with one clear error; the previous checkpoint is valid, and none is incomplete."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        run = Run("harmed", str(disk), digits_uri, tmp_path / "job.log")
        with run.start("--run.storage-timeout-s", "5") as job:
            job.wait_for(run.past(0))
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(1 << 16))
            assert job.wait() == 1, job.output
        error = only_error(job)
        assert "No space left on device" in error and str(disk) in error
        (warning,) = [line for line in job.output.splitlines() if line.startswith("warning: ")]
        assert "No space left on device" in warning and warning.endswith("; trying again for up to 5 s")
        folders = list(Path(run.location.path).glob("checkpoint-*"))
        assert folders
        for folder in folders:
            checkpoint.verify(folder)
    finally:
        subprocess.run(["umount", disk], check=True)
