"""What a run asks of the cluster, and whether the cluster has it.

Its own room because these are the questions before anything is started; cluster.py is about what runs then.
"""

import os
import time

import ray

from ddpm import connection
from ddpm.config import Config, UserError

JOINING_S = 10.0
"""How long nodes that are just joining a cluster are waited for, before it is called too small."""


def resources_per_worker(config: Config) -> dict[str, float]:
    """CPUs and GPUs of each worker, with a CPU left for the tasks that read data.

    Raises:
        UserError: the cluster is too small; Ray would wait for ever without a word.
    """
    joined = "RAY_ADDRESS" in os.environ  # else it was started here, and is all there
    deadline = time.monotonic() + (JOINING_S if joined else 0)
    while True:
        try:
            return _resources_per_worker(config, connection.resources())
        except UserError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.5)


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
        if (
            (nodes > 1 or connection.limits())
            and not uri.startswith("s3://")
            and not config.run.shared_storage
        ):
            raise UserError(
                f"--{flag} is the local folder {uri}, but the cluster {whose} that cannot see it; use "
                "s3://bucket/prefix, or say --run.shared-storage if it is mounted on all of them"
            )
