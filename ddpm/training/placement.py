"""What a run asks of the cluster, and whether the cluster has it.

Its own room because these are the questions before anything is started; cluster.py is about what runs then.
"""

import json
import os
import time

import ray

from ddpm.config import Config, UserError

JOINING_S = 10.0
"""How long nodes that are just joining a cluster are waited for, before it is called too small."""
LIMITS = "DDPM_CLUSTER_RESOURCES"
"""The variable in which a cluster that grows says how far: '{"CPU": 32, "GPU": 4}'. Ray itself does not (2.60)."""


def resources_per_worker(config: Config) -> dict[str, float]:
    """CPUs and GPUs of each worker, with a CPU left for the tasks that read data.

    Raises:
        UserError: the cluster is too small; Ray would wait for ever without a word.
    """
    joined = "RAY_ADDRESS" in os.environ  # else it was started here, and is all there
    deadline = time.monotonic() + (JOINING_S if joined else 0)
    while True:
        try:
            return _resources_per_worker(config, _cluster_resources())
        except UserError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.5)


def _cluster_resources() -> dict[str, float]:
    """What the cluster has, or what it may grow to where that is more."""
    have, limits = ray.cluster_resources(), _limits()
    return {name: max(have.get(name, 0.0), limits.get(name, 0.0)) for name in have | limits}


def _limits() -> dict[str, float]:
    text = os.environ.get(LIMITS, "{}")
    try:
        return {str(name): float(count) for name, count in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"""{LIMITS} is {text!r}; expected JSON as '{{"CPU": 32, "GPU": 4}}'""") from None


def _resources_per_worker(config: Config, have: dict[str, float]) -> dict[str, float]:
    cluster, sizes = config.cluster, config.cluster.world_sizes()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    least, most = sizes[0], sizes[-1]
    gpu = cluster.gpu if cluster.gpu is not None else gpus >= least
    if gpu and gpus < least:
        raise UserError(f"{least} workers need {least} GPUs, the cluster has {gpus:g}; use fewer workers")
    share = cluster.cpus_per_worker
    if share is None:
        share = max(min(1.0, int(100 * (cpus - 1) / most) / 100), 0.01)
    if share <= 0:
        raise UserError(f"cluster.cpus_per_worker is {share:g}; it must be above 0")
    if least * share > cpus - 1:
        right = max((cpus - 1) / least, 0)
        raise UserError(
            f"{least} workers of {share:g} CPUs leave none of the cluster's {cpus:g} CPUs to the tasks that read "
            f"data; set --cluster.cpus-per-worker to at most {right:g}, or use fewer workers"
        )
    return {"CPU": share} | ({"GPU": 1.0} if gpu else {})


def check_storage(config: Config) -> None:
    """Refuse a folder that the other nodes of the cluster cannot see."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    whose = f"has {nodes} nodes" if nodes > 1 else "grows by nodes"
    for flag, uri in (("run.storage", config.run.storage), ("data.shards", config.data.shards or "")):
        if (nodes > 1 or _limits()) and not uri.startswith("s3://") and not config.run.shared_storage:
            raise UserError(
                f"--{flag} is the local folder {uri}, but the cluster {whose} that cannot see it; use "
                "s3://bucket/prefix, or say --run.shared-storage if it is mounted on all of them"
            )
