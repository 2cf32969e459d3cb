"""Whatever dies, the run goes on, and ends with the tensors it would have ended with, bit for bit.

Every test kills something for real in a run of two workers, and compares with one run that nothing happened to.
"""

import random
import signal
import time

import processes
import pytest
from faulted import Run, assert_same, assert_tracked_once, metric

WORKER = "ray::RayTrainWorker"
CONTROLLER = "ray::TrainController"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_workers_killed_at_random_steps(run: Run, undisturbed: Run) -> None:
    """Three times a worker dies: by itself the run goes on."""
    dice = random.Random(0)
    with run.start() as job:
        for _ in range(3):
            job.wait_for(run.past(run.position()))
            time.sleep(dice.uniform(0, 0.6))
            dice.choice(job.members(WORKER)).send_signal(signal.SIGKILL)
        assert job.wait() == 0, job.output
    assert "Traceback" not in job.output
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert 0.3 < metric(run, "train/goodput")[-1][1] < 1


def test_controller_driver_and_cluster_killed(run: Run, undisturbed: Run) -> None:
    """The controller dies: the job starts another. The driver dies, then every process of the cluster: the same
    command goes on."""
    with run.start() as job:
        job.wait_for(run.past(0))
        (controller,) = job.members(CONTROLLER)
        controller.send_signal(signal.SIGKILL)
        job.wait_for(run.past(run.position() + 960))
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(run: Run, undisturbed: Run, number: int, code: int) -> None:
    """No step is lost: a checkpoint stands where the run was, and the same command goes on from there."""
    with run.start() as job:
        job.wait_for(run.past(0))
        job.process.send_signal(number)
        assert job.wait() == code, job.output
    position = run.position()
    assert f"stopped     at {position:,} images" in job.output
    assert "Traceback" not in job.output
    with run.start() as job:
        assert job.wait() == 0, job.output
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    assert metric(run, "train/goodput")[-1][1] == 1
