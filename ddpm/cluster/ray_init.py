"""Joining Ray: the one way in, for training, for preparing data, and for a pool; and what there is to share out.

Its own room because all of them stand on different floors.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
import ray._private.node
import ray._private.utils

from ddpm.utils.errors import UserError
from ddpm.utils.openmp import bound_spinning

KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    # Training is in a thread, and what threads have of their own is given back however large the other two are.
    "MALLOC_ARENA_MAX": "1",
}
"""With these the C library (glibc) keeps what a step frees for the next one, instead of asking the system for it anew,
page by page: on CPUs that is a tenth of a step. It reads them when a process begins."""

SETTINGS = {
    **KEPT_MEMORY,
    # The controller looks after its workers so often (default 2 s).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # Nodes about to be taken away are looked out for in training/monitor.py.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A worker group that does not get its resources asks again, maybe for fewer workers (default 60 s).
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # Waiting inside an async actor is what Ray Train's controller does; it need not be warned of it.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # Of a cluster started here: training comes first on this machine, not after Ray's own processes.
    "RAY_worker_niceness": "0",
    # Nor is anybody told that Ray is used, by a process of its own.
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Ray's settings that make a crash, and a start, cost less time; what the environment says comes first."""

LONGEST_REASON = 400
"""Characters of Ray's own words in an error."""

LIMITS = "DDPM_CLUSTER_RESOURCES"
"""The variable in which a cluster that grows says how far: '{"CPU": 48, "GPU": 4}'. Ray itself does not (2.60)."""


BEGUN_HERE = "DDPM_CLUSTER_BEGUN_HERE"
"""The variable that all processes of a cluster have which `connect` started, with the rest of its environment."""


class NoCluster(UserError):
    """Ray did not start, or could not be joined."""

    exit_code = 1


def connect(verbose: bool = False) -> None:
    """Join the Ray cluster of the environment (RAY_ADDRESS, or one started here), or start one on this machine.

    Raises:
        NoCluster: that did not succeed.
    """
    bound_spinning()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ[BEGUN_HERE] = "1"
    level = logging.INFO if verbose else logging.ERROR
    with _spare_processes(verbose):
        try:
            ray.init(log_to_driver=verbose, logging_level=level, include_dashboard=False)
        except Exception as error:  # Ray raises what it likes: RuntimeError, ConnectionError, plain Exception
            raise _no_cluster(error) from error
    node = ray._private.worker._global_node
    if node is None or not node.head:
        del os.environ[BEGUN_HERE]
    for name in ("ray.train", "ray.data", "ray"):
        logging.getLogger(name).setLevel(level)


def _no_cluster(error: Exception) -> NoCluster:
    reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
    if address := os.environ.get("RAY_ADDRESS"):
        return NoCluster(f"the Ray cluster at RAY_ADDRESS={address} cannot be joined: {reason}")
    return NoCluster(
        f"Ray did not start on this machine: {reason}; where it is busy or short of memory, try again when it is not"
    )


@contextmanager
def _spare_processes(verbose: bool) -> Iterator[None]:
    """A cluster that is started in this context has no processes that would serve nobody (Ray 2.60 has no switch).

    These are the dashboard's, which without a dashboard tells Ray's makers of its use, or does not; the autoscaler's,
    which has no machines to start; and the one that brings the drivers what workers print, unless it is shown. The
    agent of the node does as if it had been installed without a web server: its port may be another cluster's, and
    every start would wait four seconds for that.
    """

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def no_dashboard() -> ImportError:
        return ImportError("no dashboard is wanted")

    node, utils = ray._private.node.Node, ray._private.utils
    spared: list[tuple[Any, str, Any]] = [
        (node, "start_api_server", nothing),
        (node, "start_monitor", nothing),
        (utils, "get_dashboard_dependency_error", no_dashboard),
    ]
    if not verbose:
        spared.append((node, "start_log_monitor", nothing))
    with ExitStack() as stack:
        for owner, name, instead in spared:
            if hasattr(owner, name):  # else it is another Ray, which starts what it starts
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, instead)
        yield


def begun_here() -> bool:
    """Whether all processes of the cluster have SETTINGS, and the rest of the environment it was started from."""
    return BEGUN_HERE in os.environ


def resources() -> dict[str, float]:
    """What the joined cluster has, or what it may grow to where that is more, as {"CPU": 48.0, "GPU": 4.0}."""
    have, may_have = ray.cluster_resources(), limits()
    return {name: max(have.get(name, 0.0), may_have.get(name, 0.0)) for name in have | may_have}


def limits() -> dict[str, float]:
    """How far the cluster grows when it is asked for more; empty: it does not.

    Raises:
        UserError: DDPM_CLUSTER_RESOURCES is no JSON of numbers.
    """
    text = os.environ.get(LIMITS, "{}")
    try:
        return {name: float(count) for name, count in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"""{LIMITS} is {text!r}; expected JSON as '{{"CPU": 48, "GPU": 4}}'""") from None
