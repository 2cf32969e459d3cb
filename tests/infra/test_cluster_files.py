"""Checks of the cluster files without launching them."""

import importlib.util
import re
import tomllib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from support.launched import cluster_file
from support.processes import REPO

FILES = ("cluster.yaml", "infra/onprem/cluster.yaml")


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(cluster_file(name)))


@pytest.mark.parametrize("name", FILES)
def test_mounted_files_are_in_the_repository_and_contain_no_secret(name: str) -> None:
    for there, here in cluster_file(name)["file_mounts"].items():
        if here.startswith("~"):
            assert there == here  # a user's own token and keys, in their standard places
        else:
            assert (REPO / here).is_file()
    text = (REPO / name).read_text() + (REPO / "infra/cluster.env").read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|SECRET_ACCESS_KEY|aws_credentials|PASSWORD=(?!\$\()", text)
    assert "export RAY_AUTH_MODE=token\n" in text


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_listens_only_on_the_head(name: str) -> None:
    assert "--dashboard-host=127.0.0.1 " in cluster_file(name)["head_start_ray_commands"][-1]


def test_requirements_match_the_package() -> None:
    """The same packages, with versions that pyproject.toml allows."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["evaluation"]]
    lines = (REPO / "infra/requirements.txt").read_text().splitlines()
    pinned = {req.name: req for req in map(Requirement, (line for line in lines if not line.startswith("#")))}
    assert pinned.keys() == {Requirement(line).name for line in wanted}
    for requirement in map(Requirement, wanted):
        (pin,) = pinned[requirement.name].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version)
        assert pinned[requirement.name].extras == requirement.extras


def test_spot_machines_are_preferred_with_a_fallback() -> None:
    gpu = {"CPU": 1.0, "GPU": 1.0}
    out_of = partial(launched_nodes, [gpu])
    assert out_of() == {"gpu-spot-g6": 1}
    assert out_of("gpu-spot-g6") == {"gpu-spot-g5": 1}
    assert out_of("gpu-spot-g6", "gpu-spot-g5") == {"gpu-on-demand": 1}
    assert out_of("gpu-spot-g6", "gpu-spot-g5", "gpu-on-demand") == {"gpu-spot-g6": 1}  # start over
    assert launched_nodes([gpu] * 6) == {"gpu-spot-g6": 4, "gpu-spot-g5": 2}
    assert launched_nodes([gpu] * 6, "gpu-spot-g6") == {"gpu-spot-g5": 4, "gpu-on-demand": 2}


def test_data_tasks_get_no_gpu_machines() -> None:
    tasks = [{"CPU": 1}] * 10
    assert launched_nodes(tasks) == {"cpu-spot": 2}
    assert launched_nodes(tasks, "cpu-spot") == {"cpu-on-demand": 2}
    assert launched_nodes(tasks, "cpu-spot", "cpu-on-demand") == {"cpu-spot": 2}


def test_declared_resources_match_the_maximum_of_the_file() -> None:
    config = cluster_file("cluster.yaml")
    kinds = config["available_node_types"]
    declared = re.search(
        r"""DDPM_CLUSTER_RESOURCES='{"CPU":(\d+),"GPU":(\d+)}'""", config["head_start_ray_commands"][-1]
    )
    assert declared is not None
    cpus, gpus = map(int, declared.groups())
    assert {kind["max_workers"] for name, kind in kinds.items() if name.startswith("gpu")} == {gpus}
    max_cpus = gpus * kinds["gpu-spot-g6"]["resources"]["CPU"] + kinds["cpu-spot"]["max_workers"] * 8
    assert cpus == max_cpus and config["max_workers"] == gpus + kinds["cpu-spot"]["max_workers"]


def launched_nodes(demand: list[dict[str, float]], *unavailable: str) -> dict[str, int]:
    """Nodes that the autoscaler starts for `demand` on an empty cluster, after some types were unavailable."""
    config: dict[str, Any] = prepare_config(cluster_file("cluster.yaml"))
    tracker = NodeProviderAvailabilityTracker(timer=lambda: 0.0)
    for kind in unavailable:
        tracker.update_node_availability(
            kind, 0, NodeLaunchException("InsufficientInstanceCapacity", "", None)
        )
    kinds = config["available_node_types"]
    scorer = partial(spot_module().score, node_availability_summary=tracker.summary())
    nodes, unfulfilled = get_nodes_for(kinds, {"head": 1}, "head", config["max_workers"], demand, scorer)
    assert unfulfilled == []
    return dict(nodes)


def spot_module() -> ModuleType:
    """infra/aws/spot.py, as the head imports it."""
    spec = importlib.util.spec_from_file_location("spot", Path(REPO / "infra/aws/spot.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
