"""The resources that a run needs, and whether the cluster has them."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
import ray.util
import tenacity
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup

from ddpm.cluster import ray_init
from ddpm.config.kinds import AUTO
from ddpm.config.tree import Config
from ddpm.utils.errors import UserError

log = logging.getLogger(__name__)

DRIVER_CPUS = 0.01
"""CPUs of the driver of a trial."""
MAX_WORKERS_PER_CPU = 2
"""Each worker is a process with its own PyTorch: with more workers, starts and collectives take the CPUs' time."""
JOINING_S = 120.0
"""Seconds to wait for joining nodes before a cluster counts as too small: after `ray up` each takes about a minute."""


class TooSmall(UserError):
    """The cluster has too few CPUs or GPUs."""


def with_workers(config: Config, began: Mapping[str, Any]) -> Config:
    """`config` with the number of workers that cluster.num_workers auto stands for, and the threads of each on CPUs.

    A run that resumes has those with which it began, since equal bits are promised for one number of each. A new run
    has the largest number that leaves each worker a GPU (else a CPU) and none idle, as a range where the cluster can
    grow, with one thread each. Workers of a number that was chosen share the CPUs.

    Args:
        began: the values of ClusterConfig with which the run began, by name; empty: it begins now.
    """
    cluster = config.cluster
    have = ray_init.resources()
    on_gpus = cluster.gpu if cluster.gpu is not None else have.get("GPU", 0.0) > 0
    is_auto = cluster.num_workers == AUTO
    if is_auto and "num_workers" in began:
        cluster = replace(cluster, num_workers=began["num_workers"])
    elif is_auto:
        cluster = replace(cluster, num_workers=_auto_workers(config, have, on_gpus))
    if on_gpus:
        return replace(config, cluster=cluster)
    threads = began.get("threads_per_worker")
    if cluster.threads_per_worker is None:
        if threads is None:
            threads = 1 if is_auto else _share_of_cpus(cluster.world_sizes()[-1], have.get("CPU", 0.0))
        cluster = replace(cluster, threads_per_worker=threads)
    elif threads not in (None, cluster.threads_per_worker):
        log.warning(
            "the run began with %d threads a worker; with --cluster.threads-per-worker %d its weights will not be bit "
            "for bit those of a run that was not interrupted",
            threads,
            cluster.threads_per_worker,
        )
    return replace(config, cluster=cluster)


def _share_of_cpus(workers: int, cpus: float) -> int:
    """Threads of each of `workers` on a cluster of that many CPUs; no more than its largest node has CPUs."""
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return max(1, int(min(cpus / workers, max(nodes))))


def _auto_workers(config: Config, have: Mapping[str, float], on_gpus: bool) -> int | str:
    """The number of workers of a new run, or a range such as "1:4"."""
    gpus = have.get("GPU", 0.0)
    most = _most_workers(config, have.get("CPU", 0.0), gpus if on_gpus else None)
    if on_gpus and most < int(gpus):
        micro_batches = config.train.batch_size // config.train.micro_batch_size
        log.warning(
            "%d of %d GPUs are unused: more than %d workers would share the %d micro-batches of a step unevenly; "
            "set --train.micro-batch-size lower, or --cluster.num-workers",
            gpus - most,
            gpus,
            most,
            micro_batches,
        )
    return f"1:{most}" if ray_init.limits() and most > 1 else most


def _most_workers(config: Config, cpus: float, gpus: float | None) -> int:
    """The largest number of workers that share a step's micro-batches evenly, with a GPU or a CPU each.

    Args:
        gpus: None: workers use CPUs.
    """
    most = cpus if gpus is None else gpus
    if config.cluster.cpus_per_worker is not None:
        most = min(most, (cpus - ray_init.reading_cpus(cpus)) / config.cluster.cpus_per_worker)
    micro_batches = config.train.batch_size // config.train.micro_batch_size
    return max(n for n in range(1, micro_batches + 1) if micro_batches % n == 0 and n <= max(most, 1))


def _is_all_there(state: tenacity.RetryCallState) -> bool:
    """Whether to stop waiting for nodes; always for a cluster started here."""
    return "RAY_ADDRESS" not in os.environ or (state.seconds_since_start or 0.0) >= JOINING_S


def _log_once(state: tenacity.RetryCallState) -> None:
    if state.attempt_number == 1 and state.outcome:
        error = state.outcome.exception()
        print(f"waiting     {JOINING_S:.0f} s for nodes that may be joining: {error}", flush=True)


_once_joined = tenacity.retry(
    retry=tenacity.retry_if_exception_type(TooSmall),
    stop=_is_all_there,
    wait=tenacity.wait_fixed(0.5),
    before_sleep=_log_once,
    reraise=True,
)


@_once_joined
def resources_per_worker(config: Config) -> dict[str, float]:
    """CPUs and GPUs of each worker, with `ray_init.reading_cpus` left for the tasks that read data."""
    have = ray_init.resources()
    cluster = config.cluster
    sizes = config.cluster.world_sizes()
    cpus = have.get("CPU", 0.0)
    gpus = have.get("GPU", 0.0)
    least = sizes[0]
    most = sizes[-1]
    room = cpus - ray_init.reading_cpus(cpus)
    gpu = _on_gpus(config, least, gpus, f"{least} workers", "lower --cluster.num-workers")
    share = cluster.cpus_per_worker
    if share is None:
        # A range such as 1:99 starts no more workers than are useful.
        crowd = most if gpu else min(most, int(MAX_WORKERS_PER_CPU * cpus))
        if not gpu and cpus and least > crowd:
            raise TooSmall(
                f"{least} workers are too many for the cluster's {cpus:g} CPUs: they would wait for each other at "
                f"every step; set --cluster.num-workers to at most {crowd} ({MAX_WORKERS_PER_CPU} per CPU), better "
                f"{max(1, int(cpus))} or fewer, or set --cluster.cpus-per-worker to run this many anyway"
            )
        share = max(min(1.0, int(100 * room / max(crowd, 1)) / 100), 0.01)
    if least * share > room:
        right = room / least
        remedy = "a CPU is needed"
        if right > 0:
            remedy = f"set --cluster.cpus-per-worker to at most {right:g}, or lower --cluster.num-workers"
        raise TooSmall(
            f"{least} workers of {share:g} CPUs leave none of the cluster's {cpus:g} CPUs to the tasks that read "
            f"data; {remedy}"
        )
    return _reservation(share, cluster.gpus_per_worker if gpu else None)


def _reservation(cpus: float, gpus: float | None) -> dict[str, float]:
    """CPUs and GPUs as Ray names them; None: without a GPU."""
    if gpus is None:
        return {"CPU": cpus}
    return {"CPU": cpus, "GPU": gpus}


def possible_workers(config: Config, per_worker: dict[str, float], workers: int) -> int:
    """The number of workers that the run could have now; `workers` of them are running already."""
    have = ray.cluster_resources()
    free = ray.available_resources()
    cpus = have.get("CPU", 0.0)
    most = int((cpus - ray_init.reading_cpus(cpus)) / per_worker["CPU"])
    more = min(int(free.get(name, 0.0) / amount) for name, amount in per_worker.items())
    return min(config.cluster.world_sizes()[-1], most, workers + more)


def shortage(config: Config, per_worker: dict[str, float], placed: bool) -> str | None:
    """What the least number of workers waits for, such as "1 CPU: 4 of 4 in use"; None: there is enough of all.

    Args:
        placed: these workers may hold what is in use, so that only the cluster's size counts.
    """
    have = ray.cluster_resources()
    least = config.cluster.world_sizes()[0]
    free = have if placed else ray.available_resources()
    for name, amount in per_worker.items():
        total = have.get(name, 0.0)
        need = least * amount
        unused = free.get(name, 0.0)
        if unused < need:
            state = f"{total - unused:g} of {total:g} in use (`ray status` shows by whom)"
            if placed or total < need:
                state = f"the cluster has {total:g}"
            unit = f"{name}s" if need > 1 else name
            return f"{need:g} {unit}: {state}"
    return None


def crowding(config: Config, resources: dict[str, float]) -> str | None:
    """A warning if there are more workers than CPUs and no GPUs, else None."""
    workers = config.cluster.world_sizes()[0]
    cpus = ray_init.resources().get("CPU", 0.0)
    if resources.get("GPU") or workers <= cpus:
        return None
    enough = max(1, int(cpus))
    return (
        f"{workers} workers share {cpus:g} CPUs, and wait for each other at every step; {enough} are enough"
    )


def _on_gpus(config: Config, workers: int, have: float, who: str, remedy: str) -> bool:
    """Whether workers have GPUs: cluster.gpu, else whether the cluster has any; CPUs never stand in for them."""
    cluster = config.cluster
    need = workers * cluster.gpus_per_worker
    on_gpus = cluster.gpu if cluster.gpu is not None else have > 0
    if on_gpus and have < need:
        without = "" if cluster.gpu else ", or --cluster.gpu False to train on CPUs"
        raise TooSmall(f"{who} need {need:g} GPUs, the cluster has {have:g}; {remedy}{without}")
    return on_gpus


@_once_joined
def per_trial(config: Config, num_trials: int) -> tuple[Config, dict[str, float]]:
    """`config` with the CPUs and threads of each of `num_trials` concurrent trials, and what Ray reserves for a trial.

    A trial of one worker (cluster.num_workers 1 or auto) reads its data itself. The workers of others are reserved by
    their own worker group; CPUs are left for the tasks that read data.
    """
    have = ray_init.resources()
    workers = config.cluster.world_sizes()[-1]
    cpus = have.get("CPU", 0.0)
    total_workers = num_trials * workers
    is_group = workers > 1
    who = f"{num_trials} trials at a time of {workers} workers"
    remedy = "use a smaller --max-concurrent or --cluster.gpus-per-worker"
    gpu = _on_gpus(config, total_workers, have.get("GPU", 0.0), who, remedy)
    room = cpus - (ray_init.reading_cpus(cpus) + DRIVER_CPUS * num_trials if is_group else 0)
    share = config.cluster.cpus_per_worker
    is_crowd = share is None and not gpu and not is_group and num_trials > MAX_WORKERS_PER_CPU * cpus
    if share is None:
        share = max(min(1.0, int(100 * room / total_workers) / 100), 0.01)
    if is_crowd or total_workers * share > room:
        left = " to the tasks that read data" if is_group else ""
        raise TooSmall(
            f"{who} of {share:g} CPUs leave none of the cluster's {cpus:g} CPUs{left}; use a smaller --max-concurrent "
            "or --cluster.cpus-per-worker"
        )
    threads = config.cluster.threads_per_worker
    if threads is None and sum(node["Alive"] for node in ray.nodes()) == 1:
        threads = max(1, len(os.sched_getaffinity(0)) // total_workers)
    cluster = replace(config.cluster, cpus_per_worker=share, gpu=gpu, threads_per_worker=threads)
    if cluster.num_workers == AUTO:
        cluster = replace(cluster, num_workers=workers)
    if is_group:
        reserved = _reservation(DRIVER_CPUS, None)
    else:
        reserved = _reservation(share, cluster.gpus_per_worker if gpu else None)
    return replace(config, cluster=cluster), reserved


def remove_placement_group(hex_id: str) -> None:
    """Remove it after its owner was killed; Ray does only when the job ends (Ray 2.60)."""
    ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(hex_id))))


def check_storage(config: Config) -> None:
    """Raise UserError for a folder that other nodes of the cluster cannot see."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    if config.run.shared_storage or (nodes == 1 and not ray_init.limits()):
        return
    whose = f"has {nodes} nodes" if nodes > 1 else "can add nodes"
    for flag, uri in (("run.storage", config.run.storage), ("data.shards", config.data.shards or "")):
        if not uri.startswith("s3://"):
            raise UserError(
                f"--{flag} is the local folder {uri}, but the cluster {whose} that cannot see it; use "
                "s3://bucket/prefix, or set --run.shared-storage if all nodes mount it"
            )
