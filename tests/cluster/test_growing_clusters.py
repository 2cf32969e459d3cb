"""Resources of a run on a cluster whose machines have not joined yet."""

import pytest

from ddpm.cluster import resources
from ddpm.config import Config, override
from ddpm.utils.errors import UserError


@pytest.fixture(autouse=True)
def empty_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A growing cluster: its head has no CPUs."""
    monkeypatch.setattr("ray.cluster_resources", lambda: {"memory": 1e9})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr(resources, "JOINING_S", 0.0)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    monkeypatch.setenv("DDPM_CLUSTER_RESOURCES", '{"CPU": 48, "GPU": 4}')


def workers(count: int) -> Config:
    return override(Config(), {"cluster.num_workers": count, "run.storage": "s3://bucket/runs"})


def test_declared_resources_count_before_the_machines_join() -> None:
    assert resources.resources_per_worker(workers(4)) == {"CPU": 1.0, "GPU": 1.0}
    with pytest.raises(UserError, match="5 workers need 5 GPUs, the cluster has 4"):
        resources.resources_per_worker(workers(5))
    with pytest.raises(UserError, match="48 CPUs"):
        resources.resources_per_worker(
            override(workers(48), {"cluster.cpus_per_worker": 1.0, "cluster.gpu": False})
        )


def test_present_resources_count_if_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 8.0})
    assert resources.resources_per_worker(workers(8)) == {"CPU": 1.0, "GPU": 1.0}


def test_undeclared_resources_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPM_CLUSTER_RESOURCES")
    with pytest.raises(UserError, match="the cluster's 0 CPUs"):
        resources.resources_per_worker(workers(1))


@pytest.mark.parametrize("text", ["48", '{"CPU": "many"}', "CPU=48", ""])
def test_invalid_json_is_a_user_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DDPM_CLUSTER_RESOURCES", text)
    with pytest.raises(UserError, match="DDPM_CLUSTER_RESOURCES"):
        resources.resources_per_worker(workers(1))


def test_a_local_folder_on_a_growing_cluster_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(workers(1), {"data.shards": "/data/digits"})
    with pytest.raises(
        UserError, match=r"--data\.shards is the local folder /data/digits, but the cluster can add nodes"
    ):
        resources.check_storage(config)
    resources.check_storage(override(config, {"run.shared_storage": True}))
    monkeypatch.delenv("DDPM_CLUSTER_RESOURCES")
    resources.check_storage(config)


def test_the_cluster_sets_the_default_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPM_STORAGE", raising=False)
    assert Config().run.storage == "runs"
    monkeypatch.setenv("DDPM_STORAGE", "s3://bucket/runs")
    assert Config().run.storage == "s3://bucket/runs"


def test_a_run_waits_for_joining_nodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = iter([1.0, 2.0, 3.0, 3.0])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": next(joined)})
    monkeypatch.setattr(resources, "JOINING_S", 60.0)
    monkeypatch.delenv("DDPM_CLUSTER_RESOURCES")
    two = override(workers(2), {"cluster.cpus_per_worker": 1.0})
    assert resources.resources_per_worker(two) == {"CPU": 1.0}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "waiting     60 s for nodes that may be joining: 2 workers of 1 CPUs leave none of the"
    )
    with pytest.raises(UserError, match="must be above 0"):  # an error that no joining node could change
        resources.resources_per_worker(override(two, {"cluster.cpus_per_worker": -1.0}))
