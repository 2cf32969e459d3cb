"""Resources of runs on a cluster, also one whose machines have not joined yet; Ray itself is faked."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import ray

from ddpm.cluster import resources
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.utils.errors import UserError

Cluster = Callable[..., None]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    def has(cpus: float, gpus: float = 0, nodes: int = 1) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus})
        monkeypatch.setattr(
            ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": cpus / nodes}}] * nodes
        )
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(int(cpus))))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    return has


@pytest.fixture
def growing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A growing cluster: its head has no CPUs."""
    cluster(0)
    monkeypatch.setattr(resources, "JOINING_S", 0.0)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    monkeypatch.setenv("DDPM_CLUSTER_RESOURCES", '{"CPU": 48, "GPU": 4}')


def with_workers(count: int | str, **values: Any) -> Config:
    changes = {f"cluster.{name}": value for name, value in values.items()}
    return override(Config(), {"cluster.num_workers": count, "run.storage": "s3://bucket/runs"} | changes)


@pytest.mark.parametrize(
    ("cpus", "num_trials", "num_workers", "share", "threads"),
    [(2, 1, 1, 1.0, 2), (2, 2, 1, 1.0, 1), (2, 4, 1, 0.5, 1), (4, 2, 2, 0.74, 1), (16, 2, 2, 1.0, 4)],
)
def test_concurrent_trials_share_the_cpus(
    cluster: Cluster, cpus: int, num_trials: int, num_workers: int, share: float, threads: int
) -> None:
    """A trial of one worker reads its data itself; beside those of several a CPU is left for data tasks."""
    cluster(cpus)
    config, reserved = resources.per_trial(with_workers(num_workers), num_trials)
    shared = config.cluster
    assert (shared.cpus_per_worker, shared.threads_per_worker, shared.gpu) == (share, threads, False)
    if num_workers == 1:
        assert reserved == {"CPU": share} and num_trials * share <= cpus
    else:
        assert reserved == {"CPU": resources.DRIVER_CPUS}
        assert num_trials * (num_workers * share + resources.DRIVER_CPUS) <= cpus - 1


def test_a_trial_of_one_worker_has_its_gpu(cluster: Cluster) -> None:
    cluster(4, gpus=2)
    _, reserved = resources.per_trial(with_workers(1, gpus_per_worker=0.5), 4)
    assert reserved == {"CPU": 1.0, "GPU": 0.5}


@pytest.mark.parametrize(
    ("flags", "num_trials", "message"),
    [
        ({"cpus_per_worker": 1.5, "gpu": False}, 2, "of 1.5 CPUs leave none of the cluster's 2"),
        ({"num_workers": 2, "cpus_per_worker": 0.3, "gpu": False}, 2, "or lower --max-concurrent"),
        ({"gpu": False}, 100, "100 trials at a time of 1 workers"),
        ({"num_workers": 4, "gpu": False}, 2, "at most 4 workers"),
        ({"gpu": True}, 2, "need 2 GPUs, the cluster has 1"),
        ({}, 2, "lower --max-concurrent or --cluster.gpus-per-worker, or --cluster.gpu False"),
        ({"gpu": True, "gpus_per_worker": 0.6}, 2, "need 1.2 GPUs, the cluster has 1"),
    ],
)
def test_too_few_resources_for_concurrent_trials_are_an_error(
    cluster: Cluster, flags: dict[str, Any], num_trials: int, message: str
) -> None:
    cluster(2, gpus=1)
    with pytest.raises(UserError) as raised:
        resources.per_trial(with_workers(1, **flags), num_trials)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "flags", "expected"),
    [
        # At most two workers share a CPU.
        (2, 0, 4, {}, {"CPU": 0.25}),
        (2, 0, "1:2", {}, {"CPU": 0.5}),
        (2, 0, "1:99", {}, {"CPU": 0.25}),
        (1.5, 0, 3, {}, {"CPU": 0.25}),
        (1, 0, 1, {}, {"CPU": 0.5}),
        (1, 0, 2, {}, {"CPU": 0.25}),
        (16, 0, 16, {}, {"CPU": 0.93}),
        (16, 0, "1:99", {}, {"CPU": 0.46}),
        (
            2,
            0,
            8,
            {},
            "8 workers are too many for the cluster's 2 CPUs: .* --cluster.num-workers to at most 4 .* better 2 or",
        ),
        (2, 0, 8, {"cpus_per_worker": 0.1}, {"CPU": 0.1}),
        (2, 8, 8, {}, {"CPU": 0.12, "GPU": 1.0}),
        # One CPU is left for the tasks that read data, or half of a single one.
        (
            4,
            0,
            2,
            {"cpus_per_worker": 2.0},
            "leave none of the cluster's 4 CPUs .* to at most 1.5, or lower --cluster.num-workers",
        ),
        (
            1,
            0,
            2,
            {"cpus_per_worker": 2.0},
            "leave none of the cluster's 1 CPUs .* to at most 0.25, or",
        ),
        (0, 0, 1, {}, "leave none of the cluster's 0 CPUs .*; a CPU is needed"),
        # Too few GPUs are an error, instead of a run on CPUs that takes weeks.
        (16, 2, "2:4", {}, {"CPU": 1.0, "GPU": 1.0}),
        (
            16,
            2,
            4,
            {},
            "4 workers need 4 GPUs, the cluster has 2; lower --cluster.num-workers, or --cluster.gpu False to train",
        ),
        (16, 2, 4, {"gpu": False}, {"CPU": 1.0}),
        (16, 0, 4, {}, {"CPU": 1.0}),
        (16, 0, 4, {"gpu": True}, "need 4 GPUs, the cluster has 0; lower --cluster.num-workers$"),
        (16, 1, 4, {"gpus_per_worker": 0.25}, {"CPU": 1.0, "GPU": 0.25}),
    ],
)
def test_the_resources_of_a_worker(
    cluster: Cluster,
    cpus: float,
    gpus: float,
    workers: int | str,
    flags: dict[str, Any],
    expected: dict[str, float] | str,
) -> None:
    cluster(cpus, gpus)
    config = with_workers(workers, **flags)
    if isinstance(expected, dict):
        assert resources.resources_per_worker(config) == expected
        return
    with pytest.raises(UserError, match=expected) as raised:
        resources.resources_per_worker(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("cpus", "gpus", "micro_batches", "flags", "workers", "threads"),
    [
        (1, 0, 4, {}, 1, 1),
        (2, 0, 4, {}, 2, 1),
        (3, 0, 4, {}, 2, 1),  # of 3 workers one would take two micro-batches, and the others wait for it
        (64, 0, 4, {}, 4, 1),
        (64, 0, 1, {}, 1, 1),
        (2, 0, 4, {"threads_per_worker": 2}, 2, 2),
        (8, 0, 4, {"cpus_per_worker": 3.0}, 2, 1),
        (2, 0, 4, {"cpus_per_worker": 9.0}, 1, 1),  # rejected later
        (64, 1, 16, {}, 1, None),
        (64, 8, 16, {}, 8, None),
        (4, 6, 16, {}, 4, None),
        (64, 2, 16, {"gpus_per_worker": 0.5}, 2, None),
        (2, 8, 4, {"gpu": False}, 2, 1),
        (2, 0, 4, {"gpu": True}, 1, None),  # rejected later
    ],
)
def test_auto_workers_have_a_gpu_or_a_cpu_each_and_none_is_idle(
    cluster: Cluster,
    cpus: int,
    gpus: int,
    micro_batches: int,
    flags: dict[str, Any],
    workers: int,
    threads: int | None,
) -> None:
    cluster(cpus, gpus)
    sizes = {"train.batch_size": 32 * micro_batches, "train.micro_batch_size": 32}
    chosen = resources.with_workers(override(with_workers("auto", **flags), sizes), {}).cluster
    assert (chosen.num_workers, chosen.threads_per_worker) == (workers, threads)
    typed = resources.with_workers(with_workers(3), {}).cluster
    assert typed == with_workers(3, threads_per_worker=None if gpus else max(1, cpus // 3)).cluster


def test_gpus_that_no_worker_of_auto_uses_are_reported_once(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"train.batch_size": 512, "train.micro_batch_size": 32}
    cluster(64, 6)
    resources.with_workers(override(with_workers("auto"), sizes), {})
    assert "2 of 6 GPUs are unused" in caplog.text
    caplog.clear()
    resources.with_workers(override(with_workers("auto"), sizes), {"num_workers": 4})
    resources.with_workers(override(with_workers(4), sizes), {})
    cluster(64, 8)
    resources.with_workers(override(with_workers("auto"), sizes), {})
    assert not caplog.text


def test_auto_workers_of_a_run_that_resumes_are_those_that_it_began_with(cluster: Cluster) -> None:
    cluster(64)
    began = {"num_workers": 2, "threads_per_worker": 1}
    assert (
        resources.with_workers(with_workers("auto"), began).cluster
        == with_workers(2, threads_per_worker=1).cluster
    )
    typed = with_workers("auto", threads_per_worker=4)
    assert resources.with_workers(typed, began).cluster.threads_per_worker == 4
    cluster(1)
    config = resources.with_workers(with_workers("auto"), {"num_workers": 8})
    with pytest.raises(UserError, match=r"--cluster\.num-workers"):
        resources.resources_per_worker(config)


def test_the_threads_of_a_run_that_resumes_are_those_that_it_began_with(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """On CPUs gradients differ in their last bits between one thread and two."""
    cluster(8)
    began = vars(resources.with_workers(with_workers(2), {}).cluster)
    assert began["threads_per_worker"] == 4
    cluster(16, nodes=4)
    assert resources.with_workers(with_workers(2), {}).cluster.threads_per_worker == 4  # of a node
    cluster(64)
    for workers in (2, 4, "auto"):
        assert resources.with_workers(with_workers(workers), began).cluster.threads_per_worker == 4
    assert not caplog.text
    assert (
        resources.with_workers(with_workers(2, threads_per_worker=1), began).cluster.threads_per_worker == 1
    )
    assert "began with 4 threads" in caplog.text
    caplog.clear()
    cluster(64, gpus=8)
    assert resources.with_workers(with_workers(2), {}).cluster.threads_per_worker is None
    resources.with_workers(with_workers(2, threads_per_worker=1), began)
    assert not caplog.text


def test_auto_workers_grow_with_the_cluster(growing: None) -> None:
    assert resources.with_workers(with_workers("auto"), {}).cluster.num_workers == "1:2"
    many = override(with_workers("auto"), {"train.micro_batch_size": 8})
    assert resources.with_workers(many, {}).cluster.num_workers == "1:4"
    on_cpus = override(many, {"cluster.gpu": False})
    assert resources.with_workers(on_cpus, {}).cluster.num_workers == "1:16"


def test_a_trial_of_auto_workers_has_one(cluster: Cluster) -> None:
    cluster(16)
    config, reserved = resources.per_trial(with_workers("auto"), 2)
    assert (config.cluster.num_workers, reserved) == (1, {"CPU": 1.0})


def test_more_workers_than_cpus_give_a_warning(cluster: Cluster) -> None:
    cluster(2)
    assert resources.crowding(with_workers(2), {"CPU": 0.5}) is None
    assert resources.crowding(with_workers(4), {"CPU": 0.25, "GPU": 1.0}) is None
    warning = resources.crowding(with_workers(4), {"CPU": 0.25})
    assert warning is not None and warning.startswith("4 workers share 2 CPUs")


def test_declared_resources_count_before_the_machines_join(
    growing: None, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resources.resources_per_worker(with_workers(4)) == {"CPU": 1.0, "GPU": 1.0}
    with pytest.raises(UserError, match="5 workers need 5 GPUs, the cluster has 4"):
        resources.resources_per_worker(with_workers(5))
    with pytest.raises(UserError, match="48 CPUs"):
        resources.resources_per_worker(with_workers(48, cpus_per_worker=1.0, gpu=False))
    cluster(8, gpus=8)  # present ones count if there are more
    assert resources.resources_per_worker(with_workers(8)) == {"CPU": 1.0, "GPU": 1.0}
    cluster(0)
    monkeypatch.delenv("DDPM_CLUSTER_RESOURCES")
    with pytest.raises(UserError, match="the cluster's 0 CPUs"):
        resources.resources_per_worker(with_workers(1))


@pytest.mark.parametrize("text", ["48", '{"CPU": "many"}', "CPU=48", ""])
def test_invalid_json_is_a_user_error(growing: None, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DDPM_CLUSTER_RESOURCES", text)
    with pytest.raises(UserError, match="DDPM_CLUSTER_RESOURCES"):
        resources.resources_per_worker(with_workers(1))


def test_a_local_folder_that_nodes_cannot_see_is_a_user_error(
    growing: None, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(with_workers(1), {"data.shards": "/data/digits"})
    with pytest.raises(UserError, match=r"--data\.shards is the local folder /data/digits"):
        resources.check_storage(config)
    resources.check_storage(override(config, {"run.shared_storage": True}))
    monkeypatch.delenv("DDPM_CLUSTER_RESOURCES")
    resources.check_storage(config)
    cluster(8, nodes=2)
    with pytest.raises(UserError, match=r"/data/digits.* 2 nodes.*s3://"):
        resources.check_storage(config)


def test_the_cluster_sets_the_default_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPM_STORAGE", raising=False)
    assert Config().run.storage == "runs"
    monkeypatch.setenv("DDPM_STORAGE", "s3://bucket/runs")
    assert Config().run.storage == "s3://bucket/runs"


def test_a_run_waits_for_joining_nodes(
    growing: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = iter([1.0, 2.0, 3.0, 3.0])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": next(joined)})
    monkeypatch.setattr(resources, "JOINING_S", 60.0)
    monkeypatch.delenv("DDPM_CLUSTER_RESOURCES")
    assert resources.resources_per_worker(with_workers(2, cpus_per_worker=1.0)) == {"CPU": 1.0}
    (line,) = capsys.readouterr().out.splitlines()
    start = "waiting     60 s for nodes that may be joining: 2 workers of 1 CPUs leave none of the"
    assert line.startswith(start)
