"""infra/kubernetes: manifests that Kubernetes' published schemas accept, and KubeRay's fields, and no secret.

Schemas are those of the package kubernetes-validate. It lacks KubeRay's two kinds: the fields that the manifests use
are listed here as in the API reference (ray.io/v1, KubeRay 1.7), and their pods are checked as pods. The same holds
for the PodMonitor of the Prometheus operator.
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

from ddpm import presets
from ddpm.cli import PresetArguments

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
POD_MONITOR = record(
    "selector podMetricsEndpoints",
    selector=record(matchLabels=STRINGS),
    podMetricsEndpoints=LIST | {"items": record("port", port=STRING, interval=STRING)},
)
DOCUMENTS = {path.name: list(yaml.safe_load_all(path.read_text())) for path in FOLDER.glob("*.yaml")}
ALL = [document for documents in DOCUMENTS.values() for document in documents]


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The specs of all pods in a document."""
    if document["kind"] in SPECS:
        cluster = cluster_of(document)
        return [g["template"]["spec"] for g in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]
    return [document["spec"]["template"]["spec"]] if "template" in document.get("spec", {}) else []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_manifests_fit_the_schemas(name: str) -> None:
    for document in DOCUMENTS[name]:
        if document["kind"] in SPECS:
            assert document["apiVersion"] == "ray.io/v1"
            jsonschema.validate(document["spec"], SPECS[document["kind"]])
        elif document["kind"] == "PodMonitor":
            assert document["apiVersion"] == "monitoring.coreos.com/v1"
            jsonschema.validate(document["spec"], POD_MONITOR)
        else:
            kubernetes_validate.validate(document, VERSION, strict=True)
        for spec in pods(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
            kubernetes_validate.validate(pod, VERSION, strict=True)


def test_the_job_has_the_same_cluster_spec() -> None:
    (cluster,), (job,) = DOCUMENTS["raycluster.yaml"], DOCUMENTS["rayjob.yaml"]
    assert cluster_of(job) == cluster["spec"]
    assert cluster["spec"]["authOptions"]["mode"] == "token"


def test_declared_resources_match_the_maximum_of_the_file() -> None:
    """The head offers no resources, and no worker has started yet."""
    (document,) = DOCUMENTS["raycluster.yaml"]
    head, *_ = pods(document)
    most: Counter[str] = Counter()
    for group in cluster_of(document)["workerGroupSpecs"]:
        asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        for ours, theirs in (("CPU", "cpu"), ("GPU", "nvidia.com/gpu")):
            most[ours] += group["maxReplicas"] * int(asked.get(theirs, 0))
    (declared,) = (v for v in head["containers"][0]["env"] if v["name"] == "DDPM_CLUSTER_RESOURCES")
    assert json.loads(declared["value"]) == most


def test_the_entrypoint_is_a_valid_command() -> None:
    (job,) = DOCUMENTS["rayjob.yaml"]
    program, command, *words = job["spec"]["entrypoint"].split()
    assert (program, command) == ("ddpm", "train")
    defaults = {name: PresetArguments(name, config) for name, config in presets.PRESETS.items()}
    parsed = tyro.cli(tyro.extras.subcommand_type_from_defaults(defaults, presets.ABOUT), args=words)
    assert parsed.config.run.storage == "s3://BUCKET/runs"
    assert parsed.config.cluster.num_workers == "1:8"


def test_no_pod_runs_as_root_or_can_become_root() -> None:
    found = [spec for document in ALL for spec in pods(document)]
    assert len(found) == 8
    for spec in found:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["image"].endswith(":latest")
            assert ":" in container["image"]


def test_secrets_are_referenced_and_never_written() -> None:
    for document in ALL:
        assert document["kind"] != "Secret"
        for spec in pods(document):
            for variable in spec["containers"][0].get("env", []):
                if "PASSWORD" in variable["name"] or "SECRET" in variable["name"]:
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == "ddpm-mlflow"


def test_nothing_is_exposed_to_the_internet() -> None:
    services = [d["spec"].get("type", "ClusterIP") for d in ALL if d["kind"] == "Service"]
    services += [cluster_of(d)["headGroupSpec"]["serviceType"] for d in ALL if d["kind"] in SPECS]
    assert set(services) == {"ClusterIP"}
    policies = {d["metadata"]["name"]: d["spec"] for d in ALL if d["kind"] == "NetworkPolicy"}
    (entrance,) = policies["postgres"]["ingress"]
    assert entrance["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "mlflow"}}}]


def test_mlflow_gets_the_settings_it_needs() -> None:
    serve = (REPO / "infra/mlflow/serve").read_text()
    (line,) = (line for line in serve.splitlines() if line.startswith("for name in"))
    (spec,) = (pods(d)[0] for d in DOCUMENTS["mlflow.yaml"] if d["kind"] == "Deployment")
    given = {variable["name"] for variable in spec["containers"][0]["env"]}
    assert set(line.removesuffix("; do").split()[3:]) <= given
