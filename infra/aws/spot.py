"""Tested: with Ray's autoscaler (tests/infra/test_cluster_files.py), and on emulated AWS (test_aws_cluster.py there).

A scorer for Ray's autoscaler: a machine kind that AWS has run out of comes after all others. Ray remembers for half
an hour that a kind was not available, and requests it again all the same: its own scorer ignores that (2.60). The head
reads the import path of another scorer from RAY_AUTOSCALER_UTILIZATION_SCORER. Ray's pages do not describe that
variable. Without it, Ray requests the first kind again and again, until AWS has one.
"""

from collections.abc import Sequence
from typing import Any


def score(
    node_resources: dict[str, float],
    resources: Sequence[dict[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[bool, bool, int, float] | None:
    """How well one machine of `node_type` fits what is asked for: the larger the better; None: not at all.

    In this order: no GPU is wasted on tasks of CPUs; AWS had such a machine; it has many of the resources asked for;
    little of it stays unused.

    Args:
        node_resources: what such a machine has.
        resources: the bundles asked for, as {"CPU": 1, "GPU": 1}.
        node_type: its name in cluster.yaml.
        node_availability_summary: how the last attempts to start machines went.
    """
    used: dict[str, float] = {}
    for bundle in resources:
        together = {name: used.get(name, 0) + amount for name, amount in bundle.items()}
        if all(total <= node_resources.get(name, 0) for name, total in together.items()):
            used |= together
    shares = [total / node_resources[name] for name, total in used.items() if total > 0]
    if not shares:
        return None
    has_gpu = node_resources.get("GPU", 0) > 0
    is_gpu_asked_for = any(bundle.get("GPU", 0) > 0 for bundle in resources)
    last_attempt = node_availability_summary.node_availabilities.get(node_type)
    is_available = last_attempt is None or last_attempt.is_available
    return is_gpu_asked_for or not has_gpu, is_available, len(shares), min(shares)
