"""What a run asks of the cluster, and whether the cluster has it.

Its own room because these are the questions before anything is started; cluster.py is about what runs then.
"""

import ray

from ddpm.config import Config, UserError


def resources_per_worker(config: Config) -> dict[str, float]:
    """CPUs and GPUs of each worker, with a CPU left for the tasks that read data.

    Raises:
        UserError: the cluster is too small; Ray would wait for ever without a word.
    """
    cluster, have = config.cluster, ray.cluster_resources()
    workers, cpus, gpus = cluster.num_workers, have.get("CPU", 0.0), have.get("GPU", 0.0)
    if workers < 1:
        raise UserError(f"cluster.num_workers is {workers}; it must be at least 1")
    gpu = cluster.gpu if cluster.gpu is not None else gpus >= workers
    if gpu and gpus < workers:
        raise UserError(f"{workers} workers need {workers} GPUs, the cluster has {gpus:g}; use fewer workers")
    share = cluster.cpus_per_worker
    if share is None:
        share = max(min(1.0, int(100 * (cpus - 1) / workers) / 100), 0.01)
    if share <= 0:
        raise UserError(f"cluster.cpus_per_worker is {share:g}; it must be above 0")
    if workers * share > cpus - 1:
        right = max((cpus - 1) / workers, 0)
        raise UserError(
            f"{workers} workers of {share:g} CPUs leave none of the cluster's {cpus:g} CPUs to the tasks that read "
            f"data; set --cluster.cpus-per-worker to at most {right:g}, or use fewer workers"
        )
    return {"CPU": share} | ({"GPU": 1.0} if gpu else {})


def check_storage(config: Config) -> None:
    """Refuse a folder that the other nodes of the cluster cannot see."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    for flag, uri in (("run.storage", config.run.storage), ("data.shards", config.data.shards or "")):
        if nodes > 1 and not uri.startswith("s3://") and not config.run.shared_storage:
            raise UserError(
                f"--{flag} is the local folder {uri}, but the cluster has {nodes} nodes that cannot see it; use "
                "s3://bucket/prefix, or say --run.shared-storage if it is mounted on all of them"
            )
