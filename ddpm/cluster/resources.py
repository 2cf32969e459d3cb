"""The resources that a run needs, and whether the cluster has them."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
        if threads is None and is_auto:
            threads = 1
        elif threads is None:
            share = have.get("CPU", 0.0) / cluster.world_sizes()[-1]
            nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
            threads = max(1, int(min(share, max(nodes))))  # a worker is on one node
        cluster = replace(cluster, threads_per_worker=threads)
    elif threads not in (None, cluster.threads_per_worker):
        log.warning(
            "the run began with %d threads a worker; with --cluster.threads-per-worker %d its weights will not be bit "
            "for bit those of a run that was not interrupted",
            threads,
            cluster.threads_per_worker,
        )
    return replace(config, cluster=cluster)


def _auto_workers(config: Config, have: Mapping[str, float], on_gpus: bool) -> int | str:
    """The number of workers of a new run, or a range such as "1:4".

    The largest number that shares a step's micro-batches evenly, with a GPU or a CPU for each worker.
    """
    cpus = have.get("CPU", 0.0)
    gpus = have.get("GPU", 0.0)
    room = gpus if on_gpus else cpus
    if config.cluster.cpus_per_worker is not None:
        room = min(room, (cpus - ray_init.reading_cpus(cpus)) / config.cluster.cpus_per_worker)
    micro_batches = config.train.batch_size // config.train.micro_batch_size
    even = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    workers = max(n for n in even if n <= max(room, 1))
    if on_gpus and workers < int(gpus):
        log.warning(
            "%d of %d GPUs are unused: more than %d workers would share the %d micro-batches of a step unevenly; "
            "set --train.micro-batch-size lower, or --cluster.num-workers",
            gpus - workers,
            gpus,
            workers,
            micro_batches,
        )
    return f"1:{workers}" if ray_init.limits() and workers > 1 else workers


def _is_done_waiting(state: tenacity.RetryCallState) -> bool:
    """Whether to stop waiting for nodes. A cluster that this process started has no others to wait for."""
    return "RAY_ADDRESS" not in os.environ or (state.seconds_since_start or 0.0) >= JOINING_S


def _print_once(state: tenacity.RetryCallState) -> None:
    if state.attempt_number == 1 and state.outcome:
        error = state.outcome.exception()
        print(f"waiting     {JOINING_S:.0f} s for nodes that may be joining: {error}", flush=True)


_once_joined = tenacity.retry(
    retry=tenacity.retry_if_exception_type(TooSmall),
    stop=_is_done_waiting,
    wait=tenacity.wait_fixed(0.5),
    before_sleep=_print_once,
    reraise=True,
)


@dataclass(frozen=True)
class _Demand:
    """Workers that are to run at the same time."""

    who: str
    """Their name in messages: "4 workers"."""
    least: int
    """The number of workers that must fit."""
    largest: int
    """The number of workers that should fit."""
    flag: str
    """What to lower for fewer of them."""
    gpu_flag: str
    """What to lower so that they need fewer GPUs."""
    other_cpus: float
    """CPUs that are not for workers."""
    others: str
    """The end of a message that says what has these CPUs."""


@_once_joined
def resources_per_worker(config: Config) -> dict[str, float]:
    """CPUs and GPUs of each worker of a run, with `ray_init.reading_cpus` left for the tasks that read data."""
    have = ray_init.resources()
    sizes = config.cluster.world_sizes()
    demand = _Demand(
        who=f"{sizes[0]} workers",
        least=sizes[0],
        largest=sizes[-1],
        flag="--cluster.num-workers",
        gpu_flag="--cluster.num-workers",
        other_cpus=ray_init.reading_cpus(have.get("CPU", 0.0)),
        others=" to the tasks that read data",
    )
    return _per_worker(config, demand, have)


@_once_joined
def per_trial(config: Config, num_trials: int) -> tuple[Config, dict[str, float]]:
    """`config` with the CPUs and threads of each of `num_trials` concurrent trials, and what Ray reserves for a trial.

    A trial of one worker (cluster.num_workers 1 or auto) reads its data itself. The workers of others are reserved by
    their own worker group; CPUs are left for the tasks that read data.
    """
    have = ray_init.resources()
    workers = config.cluster.world_sizes()[-1]
    total_workers = num_trials * workers
    is_group = workers > 1
    other_cpus = 0.0
    if is_group:
        other_cpus = ray_init.reading_cpus(have.get("CPU", 0.0)) + DRIVER_CPUS * num_trials
    demand = _Demand(
        who=f"{num_trials} trials at a time of {workers} workers",
        least=total_workers,
        largest=total_workers,
        flag="--max-concurrent or --cluster.num-workers" if is_group else "--max-concurrent",
        gpu_flag="--max-concurrent or --cluster.gpus-per-worker",
        other_cpus=other_cpus,
        others=" to the tasks that read data" if is_group else "",
    )
    per_worker = _per_worker(config, demand, have)
    threads = config.cluster.threads_per_worker
    if threads is None and sum(node["Alive"] for node in ray.nodes()) == 1:
        threads = max(1, len(os.sched_getaffinity(0)) // total_workers)
    cluster = replace(
        config.cluster,
        num_workers=workers if config.cluster.num_workers == AUTO else config.cluster.num_workers,
        cpus_per_worker=per_worker["CPU"],
        gpu="GPU" in per_worker,
        threads_per_worker=threads,
    )
    return replace(config, cluster=cluster), {"CPU": DRIVER_CPUS} if is_group else per_worker


def _per_worker(config: Config, demand: _Demand, have: Mapping[str, float]) -> dict[str, float]:
    """CPUs and GPUs of each worker on a cluster of the resources `have`, as Ray names them."""
    cluster = config.cluster
    cpus = have.get("CPU", 0.0)
    gpus = have.get("GPU", 0.0)
    on_gpus = cluster.gpu if cluster.gpu is not None else gpus > 0
    need = demand.least * cluster.gpus_per_worker
    if on_gpus and gpus < need:  # CPUs never stand in for GPUs
        instead = "" if cluster.gpu else ", or --cluster.gpu False to train on CPUs"
        raise TooSmall(
            f"{demand.who} need {need:g} GPUs, the cluster has {gpus:g}; lower {demand.gpu_flag}{instead}"
        )
    room = cpus - demand.other_cpus
    share = cluster.cpus_per_worker
    if share is None:
        # A range such as 1:99 starts no more workers than are useful.
        useful = demand.largest if on_gpus else min(demand.largest, int(MAX_WORKERS_PER_CPU * cpus))
        if not on_gpus and cpus and demand.least > useful:
            raise TooSmall(
                f"{demand.who} are too many for the cluster's {cpus:g} CPUs: they would wait for each other at "
                f"every step; lower {demand.flag} to at most {useful} workers ({MAX_WORKERS_PER_CPU} per CPU), better "
                f"{max(1, int(cpus))} or fewer, or set --cluster.cpus-per-worker to run this many anyway"
            )
        share = max(min(1.0, int(100 * room / max(useful, 1)) / 100), 0.01)
    if demand.least * share > room:
        remedy = "a CPU is needed"
        if room > 0:
            remedy = (
                f"set --cluster.cpus-per-worker to at most {room / demand.least:g}, or lower {demand.flag}"
            )
        raise TooSmall(
            f"{demand.who} of {share:g} CPUs leave none of the cluster's {cpus:g} CPUs{demand.others}; {remedy}"
        )
    return {"CPU": share, "GPU": cluster.gpus_per_worker} if on_gpus else {"CPU": share}


def possible_workers(config: Config, per_worker: dict[str, float], workers: int) -> int:
    """The number of workers that the run could have now; `workers` of them are running already."""
    have = ray.cluster_resources()
    free = ray.available_resources()
    cpus = have.get("CPU", 0.0)
    fitting = int((cpus - ray_init.reading_cpus(cpus)) / per_worker["CPU"])
    more = min(int(free.get(name, 0.0) / amount) for name, amount in per_worker.items())
    return min(config.cluster.world_sizes()[-1], fitting, workers + more)


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
