"""Resources of concurrent runs on a cluster, and errors when there are too few; Ray itself is faked."""

import os
from collections.abc import Callable

import pytest
import ray

from ddpm.cluster import resources
from ddpm.config import Config, override
from ddpm.utils.errors import UserError

Cluster = Callable[..., None]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    def has(cpus: float, gpus: float = 0, nodes: int = 1) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus})
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * nodes)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(int(cpus))))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    return has


@pytest.mark.parametrize(
    ("cpus", "num_runs", "num_workers", "share", "threads"),
    [(2, 1, 1, 0.99, 2), (2, 2, 1, 0.49, 1), (4, 2, 2, 0.74, 1), (16, 2, 2, 1.0, 4), (16, 8, 1, 1.0, 2)],
)
def test_a_cpu_is_left_for_data_tasks(
    cluster: Cluster, cpus: int, num_runs: int, num_workers: int, share: float, threads: int
) -> None:
    cluster(cpus)
    found = resources.shared(override(Config(), {"cluster.num_workers": num_workers}), num_runs).cluster
    assert (found.cpus_per_worker, found.threads_per_worker, found.gpu) == (share, threads, False)
    drivers = num_runs * resources.DRIVER_CPUS
    assert num_runs * num_workers * share + drivers <= cpus - 1
    resources.resources_per_worker(override(Config(), {"cluster.cpus_per_worker": share}))


def test_several_runs_share_a_gpu(cluster: Cluster) -> None:
    cluster(16, gpus=1)
    config = override(Config(), {"cluster.gpus_per_worker": 0.25})
    assert resources.shared(config, 4).cluster.gpu is True
    assert resources.resources_per_worker(config) == {"CPU": 1.0, "GPU": 0.25}


@pytest.mark.parametrize(
    ("flags", "num_runs", "message"),
    [
        (
            {"cluster.cpus_per_worker": 1.0},
            2,
            "2 trials at a time of 1 workers of 1 CPUs leave none of the cluster's 2",
        ),
        ({"cluster.num_workers": 2, "cluster.cpus_per_worker": 0.3}, 2, "use a smaller --max-concurrent"),
        ({}, 100, "100 trials at a time of 1 workers of 0.01 CPUs"),
        ({"cluster.gpu": True}, 2, "need 2 GPUs, the cluster has 1"),
        (
            {},
            2,
            "need 2 GPUs, the cluster has 1; use a smaller --max-concurrent or --cluster.gpus-per-worker, or",
        ),
        ({"cluster.gpu": True, "cluster.gpus_per_worker": 0.6}, 2, "need 1.2 GPUs, the cluster has 1"),
        ({}, 0, "--max-concurrent is 0; it must be at least 1"),
    ],
)
def test_too_few_resources_are_a_one_line_error(
    cluster: Cluster, flags: dict, num_runs: int, message: str
) -> None:
    cluster(2, gpus=1)
    with pytest.raises(UserError) as raised:
        resources.shared(override(Config(), flags), num_runs)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_gpus_per_worker_is_at_most_one(cluster: Cluster) -> None:
    cluster(2, gpus=1)
    with pytest.raises(UserError, match=r"gpus_per_worker is 2; it must be above 0 and at most 1"):
        resources.resources_per_worker(override(Config(), {"cluster.gpus_per_worker": 2.0}))


def test_too_few_gpus_are_an_error(cluster: Cluster) -> None:
    """Too few GPUs are an error, instead of a run on CPUs that takes weeks."""
    four, elastic = (override(Config(), {"cluster.num_workers": n}) for n in (4, "2:4"))
    cluster(16, gpus=2)
    assert resources.resources_per_worker(elastic) == {"CPU": 1.0, "GPU": 1.0}
    with pytest.raises(UserError) as raised:
        resources.resources_per_worker(four)
    assert str(raised.value) == (
        "4 workers need 4 GPUs, the cluster has 2; use fewer workers, or --cluster.gpu False to train on CPUs"
    )
    assert resources.resources_per_worker(override(four, {"cluster.gpu": False})) == {"CPU": 1.0}
    cluster(16)
    assert resources.resources_per_worker(four) == {"CPU": 1.0}
    with pytest.raises(UserError, match=r"need 4 GPUs, the cluster has 0; use fewer workers$"):
        resources.resources_per_worker(override(four, {"cluster.gpu": True}))


@pytest.mark.parametrize(
    ("cpus", "workers", "share"),
    [(2, 4, 0.25), (2, "1:2", 0.5), (2, "1:99", 0.25), (1.5, 3, 0.16), (16, 16, 0.93), (16, "1:99", 0.46)],
)
def test_at_most_two_workers_share_a_cpu(
    cluster: Cluster, cpus: float, workers: int | str, share: float
) -> None:
    config = override(Config(), {"cluster.num_workers": workers})
    cluster(cpus)
    assert resources.resources_per_worker(config) == {"CPU": share}


def test_too_many_workers_per_cpu_are_a_user_error(cluster: Cluster) -> None:
    eight = override(Config(), {"cluster.num_workers": 8})
    cluster(2)
    with pytest.raises(
        UserError,
        match=r"^8 workers are too many for the cluster's 2 CPUs: .* use at most 4 .*, better 2 or fewer",
    ):
        resources.resources_per_worker(eight)
    requested = override(eight, {"cluster.cpus_per_worker": 0.1})
    assert resources.resources_per_worker(requested) == {"CPU": 0.1}
    cluster(2, gpus=8)
    assert resources.resources_per_worker(eight) == {"CPU": 0.12, "GPU": 1.0}


@pytest.mark.parametrize(
    ("cpus", "remedy"),
    [
        (4, "set --cluster.cpus-per-worker to at most 1.5, or use fewer workers"),
        (1, "more than one CPU is needed"),
    ],
)
def test_workers_that_leave_no_cpu_for_read_tasks_are_a_user_error(
    cluster: Cluster, cpus: float, remedy: str
) -> None:
    cluster(cpus)
    config = override(Config(), {"cluster.num_workers": 2, "cluster.cpus_per_worker": 2.0})
    with pytest.raises(UserError) as raised:
        resources.resources_per_worker(config)
    assert str(raised.value) == (
        f"2 workers of 2 CPUs leave none of the cluster's {cpus} CPUs to the tasks that read data; {remedy}"
    )


def test_more_workers_than_cpus_give_a_warning(cluster: Cluster) -> None:
    two, four = (override(Config(), {"cluster.num_workers": n}) for n in (2, 4))
    cluster(2)
    assert resources.crowding(two, {"CPU": 0.5}) is None
    assert resources.crowding(four, {"CPU": 0.25, "GPU": 1.0}) is None
    warning = resources.crowding(four, {"CPU": 0.25})
    assert warning == "4 workers share 2 CPUs, and wait for each other at every step; 2 are enough"
