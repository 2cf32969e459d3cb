"""infra/kubernetes: a RayCluster and a RayJob that the schemas accept.

Pods are validated by Kubernetes' published schemas, those of the package kubernetes-validate. It lacks KubeRay's two
kinds: the fields that the manifests use are listed here as in the API reference (ray.io/v1, KubeRay 1.7).
"""

import json
from collections import Counter
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import tyro
import yaml
from support.processes import REPO

from ddpm.config import presets
from ddpm.config.presets import PresetArguments

FOLDER = REPO / "infra/kubernetes"
VERSION = "1.33"
STRING, INTEGER, BOOLEAN, ANY, LIST = (
    {"type": kind} for kind in ("string", "integer", "boolean", "object", "array")
)
STRINGS = ANY | {"additionalProperties": STRING}


def record(required: str = "", **properties: Any) -> dict[str, Any]:
    return ANY | {"required": required.split(), "properties": properties, "additionalProperties": False}


POD = record("spec", spec=ANY, metadata=ANY)
GROUP = record(
    "groupName maxReplicas minReplicas template",
    groupName=STRING,
    **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), INTEGER),
    rayStartParams=STRINGS,
    template=POD,
)
CLUSTER = record(
    "headGroupSpec",
    rayVersion=STRING,
    authOptions=record(mode={"enum": ["disabled", "token"]}, secretName=STRING),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=record(
        idleTimeoutSeconds=INTEGER,
        resources=ANY,
        securityContext=ANY,
        env=LIST,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    ),
    headGroupSpec=record(
        "template",
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=STRINGS,
        template=POD,
    ),
    workerGroupSpecs=LIST | {"items": GROUP},
)
JOB = record(
    entrypoint=STRING,
    backoffLimit=INTEGER,
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER,
    rayClusterSpec=CLUSTER,
)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB}
DOCUMENTS = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The specs of all pods of a cluster, the head first."""
    cluster = cluster_of(document)
    return [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_manifests_fit_the_schemas(name: str) -> None:
    document = DOCUMENTS[name]
    assert document["apiVersion"] == "ray.io/v1"
    jsonschema.validate(document["spec"], SPECS[document["kind"]])
    for spec in pods(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
        kubernetes_validate.validate(pod, VERSION, strict=True)


def test_the_job_has_the_same_cluster_and_it_needs_a_token() -> None:
    cluster = DOCUMENTS["raycluster"]["spec"]
    assert cluster_of(DOCUMENTS["rayjob"]) == cluster
    assert cluster["authOptions"]["mode"] == "token"


def test_declared_resources_match_the_maximum_of_the_file() -> None:
    """The head offers no resources, and no worker has started yet."""
    document = DOCUMENTS["raycluster"]
    head, *_ = pods(document)
    most: Counter[str] = Counter()
    for group in cluster_of(document)["workerGroupSpecs"]:
        asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        most["CPU"] += group["maxReplicas"] * int(asked["cpu"])
        most["GPU"] += group["maxReplicas"] * int(asked.get("nvidia.com/gpu", 0))
    (declared,) = (v for v in head["containers"][0]["env"] if v["name"] == "DDPM_CLUSTER_RESOURCES")
    assert json.loads(declared["value"]) == most


def test_the_entrypoint_is_a_valid_command() -> None:
    program, command, *words = DOCUMENTS["rayjob"]["spec"]["entrypoint"].split()
    assert (program, command) == ("ddpm", "train")
    defaults = {name: PresetArguments(name, config) for name, config in presets.PRESETS.items()}
    parsed = tyro.cli(tyro.extras.subcommand_type_from_defaults(defaults, presets.ABOUT), args=words)
    assert parsed.config.run.storage == "s3://BUCKET/runs"
    assert parsed.config.cluster.num_workers == "1:8"


def test_no_pod_runs_as_root_or_can_become_root() -> None:
    for spec in pods(DOCUMENTS["raycluster"]):
        assert spec["securityContext"]["runAsNonRoot"] is True
        (container,) = spec["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
