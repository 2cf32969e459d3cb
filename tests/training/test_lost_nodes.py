"""Nodes leave and join: two workers on two nodes and data tasks on a third, in one cluster on this machine.

A lost node is killed without notice. The end of the run is compared with an undisturbed run
(tests/support/faulted.py).
"""

import contextlib
import itertools
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import processes
from support.faulted import Run, assert_recovered, metric
from support.servers import RayHead, RayNode, ray_head_env

pytestmark = pytest.mark.slow

WORKER = "ray::RayTrainWorker"
WATCHER = "ray::PreemptionWatcher"
# On a node of two CPUs a worker leaves no room for a data task, which takes one CPU.
WORKER_CPUS = ("--cluster.cpus-per-worker", "1.5", "--run.shared-storage")


@pytest.fixture
def head(tmp_path: Path) -> Iterator[RayHead]:
    """A head without CPUs. One per test, so that no test waits until the nodes of another one are forgotten."""
    with RayHead(tmp_path / "ray", num_cpus=0, env=ray_head_env()) as head:
        yield head


@pytest.fixture
def nodes(head: RayHead) -> Iterator[ExitStack]:
    """The nodes of a test, which are killed at its end."""
    with ExitStack() as stack:
        yield stack


def add(nodes: ExitStack, head: RayHead, num_cpus: int) -> RayNode:
    node = head.add_node(num_cpus)
    nodes.callback(node.kill)
    return node


@pytest.mark.long
@pytest.mark.nightly
def test_a_preempted_node_and_two_lost_nodes(
    run: Run, undisturbed: Run, head: RayHead, nodes: ExitStack
) -> None:
    """When a node's preemption is announced, the workers write a checkpoint of the current step and continue on another
    node: that does not count as a failure. Then both worker nodes are lost, with the data blocks that they hold; then
    the node of the data tasks."""
    data, first, second = [add(nodes, head, num_cpus) for num_cpus in (1, 2, 2)]
    pids = [head.process.pid, data.pid, first.pid, second.pid]
    env = {"RAY_ADDRESS": head.address, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2"}
    with run.start(*WORKER_CPUS, env=env) as job:
        job.wait_for(run.past(0))
        (worker,) = processes.members(second.pid, WORKER)
        with processes.paused([worker]):
            third = add(nodes, head, 2)
            job.wait_for(lambda: any(processes.members(pid, WATCHER) for pid in pids))
            head.drain(second.node_id, within_s=60)
            time.sleep(1)  # time for the watcher to poll
        job.wait_for(lambda: "continuing on other nodes" in job.output)
        job.wait_for(run.past(run.images_seen()))
        assert "failed" not in job.output
        moved_at = run.images_seen()
        with processes.paused(processes.members(third.pid, WORKER)):  # so that the run does not finish before
            second.kill()
            first.kill()
        add(nodes, head, 2)
        job.wait_for(run.past(run.images_seen()))
        data.kill()
        add(nodes, head, 1)
        assert job.wait() == 0, job.output
    assert_recovered(run, undisturbed, job)
    assert all(step > moved_at for step, _ in metric(run, "train/goodput"))  # moving lost no step


@pytest.mark.long
@pytest.mark.nightly
def test_an_elastic_run_shrinks_and_grows(run: Run, head: RayHead, nodes: ExitStack) -> None:
    """4 workers, 3 while a node is missing, which share 4 micro-batches unevenly, 4 again; growing loses no step."""
    *_, second = [add(nodes, head, num_cpus) for num_cpus in (1, 5, 2)]
    flags = (*WORKER_CPUS, "--cluster.num-workers", "1:4", "--cluster.resize-interval-s", "3")
    with run.start(*flags, "--train.total-images", "1000000", env={"RAY_ADDRESS": head.address}) as job:
        # It may start with fewer workers: Ray 2.60 looks for new nodes only every 20 s.
        job.wait_for(lambda: worker_counts(run)[-1:] == [4], poll_s=0.5)
        second.kill()
        job.wait_for(lambda: worker_counts(run)[-1:] == [3], poll_s=0.5)
        add(nodes, head, 2)
        job.wait_for(lambda: worker_counts(run)[-1:] == [4], poll_s=0.5)
        job.process.send_signal(signal.SIGINT)
        assert job.wait() == 128 + signal.SIGINT, job.output
    assert worker_counts(run)[-3:] == [4, 3, 4]
    assert "warning: 3 workers share 4 micro-batches" in job.output
    # Images whose training was lost; goodput is not logged while there are none.
    lost = {0: 0.0} | {seen: seen / goodput - seen for seen, goodput in metric(run, "train/goodput")}
    (*_, last) = (seen for seen, workers in metric(run, "train/workers") if workers == 3)
    before_growing = lost[max(seen for seen in lost if seen <= last)]
    assert lost[max(lost)] == pytest.approx(before_growing, abs=32)  # half a step


def test_a_run_without_room_says_so_and_stops_at_once(run: Run, head: RayHead, nodes: ExitStack) -> None:
    """There is no worker whose step SIGTERM could wait for, and all that was stored is kept."""
    _, node = [add(nodes, head, num_cpus) for num_cpus in (1, 2)]
    flags = (*WORKER_CPUS, "--cluster.num-workers", "1", "--train.total-images", "1000000")
    with run.start(*flags, env={"RAY_ADDRESS": head.address}) as job:
        job.wait_for(run.past(0))
        node.kill()
        job.wait_for(lambda: "waiting     for 1.5 CPUs: the cluster has 1\n" in job.output)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 128 + signal.SIGTERM, job.output
    assert "SIGTERM: stopping now" in job.output
    assert f"stopped     at {run.images_seen():,} images" in job.output


def worker_counts(run: Run) -> list[int]:
    """The sequence of worker counts that MLflow has so far."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # nothing is logged yet
        workers = [int(value) for _, value in metric(run, "train/workers")]
        return [size for size, _ in itertools.groupby(workers)]
    return []
