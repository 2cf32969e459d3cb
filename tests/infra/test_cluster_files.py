"""Checks of the cluster files without launching them."""

import re
import tomllib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import spot
from packaging.requirements import Requirement
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from support.launched import cluster_file
from support.processes import REPO


@pytest.mark.parametrize("name", ["cluster.yaml", "infra/onprem/cluster.yaml"])
def test_a_cluster_file_is_valid_private_and_contains_no_secret(name: str) -> None:
    config = cluster_file(name)
    validate_config(prepare_config(config))
    assert "--dashboard-host=127.0.0.1 " in config["head_start_ray_commands"][-1]
    for there, here in config["file_mounts"].items():
        if here.startswith("~"):
            assert there == here  # a user's own token and keys, in their standard places
        else:
            assert (REPO / here).is_file()
    text = (REPO / name).read_text() + (REPO / "infra/cluster.env").read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|SECRET_ACCESS_KEY|PASSWORD=", text)
    assert "export RAY_AUTH_MODE=token\n" in text


def test_requirements_pin_versions_that_the_package_allows() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = (REPO / "infra/requirements.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {requirement.name: requirement for requirement in pinned}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["evaluation"]]
    assert pins.keys() == {Requirement(line).name for line in wanted}
    for requirement in map(Requirement, wanted):
        pin = pins[requirement.name]
        (version,) = pin.specifier
        assert version.operator == "==" and requirement.specifier.contains(version.version)
        assert pin.extras == requirement.extras


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


@pytest.mark.parametrize(
    "demand",
    [
        [{"CPU": 1, "GPU": 1}] * 3 + [{"CPU": 1}] * 2,
        [{"CPU": 1}] * 30,
        [{"CPU": 2, "GPU": 1}, {"CPU": 8}],
        [{"CPU": 0.01}, {"GPU": 0.5}, {"GPU": 0.5}],
        [],
    ],
)
def test_machines_are_those_of_rays_own_scorer_while_aws_has_all(demand: list[dict[str, float]]) -> None:
    assert launched_nodes(demand) == launched_nodes(demand, score=_default_utilization_scorer)


def launched_nodes(
    demand: list[dict[str, float]], *unavailable: str, score: Callable[..., Any] = spot.score
) -> dict[str, int]:
    """Nodes that the autoscaler starts for `demand` on an empty cluster, after some types were unavailable."""
    config: dict[str, Any] = prepare_config(cluster_file("cluster.yaml"))
    tracker = NodeProviderAvailabilityTracker(timer=lambda: 0.0)
    for kind in unavailable:
        unavailability = NodeLaunchException("InsufficientInstanceCapacity", "", None)
        tracker.update_node_availability(kind, 0, unavailability)
    kinds = config["available_node_types"]
    scorer = partial(score, node_availability_summary=tracker.summary())
    nodes, unfulfilled = get_nodes_for(kinds, {"head": 1}, "head", config["max_workers"], demand, scorer)
    assert unfulfilled == []
    return dict(nodes)
