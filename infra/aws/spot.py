"""Tested: with Ray's autoscaler (tests/infra/test_cluster_files.py), and on emulated AWS (test_aws_cluster.py there).

A scorer for Ray's autoscaler: a machine kind that AWS has run out of comes after all others. Ray remembers for half
an hour that a kind was not available, and requests it again all the same: its own scorer ignores that (2.60). Another
scorer is Ray's documented extension: the head reads its import path from RAY_AUTOSCALER_UTILIZATION_SCORER. The one
private import is Ray's default scorer, which this one extends.
"""

from typing import Any

from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer


def score(
    node_resources: dict[str, float],
    resources: list[dict[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """How well one machine of `node_type` fits what is asked for: the larger the better; None: not at all.

    Args:
        node_resources: what such a machine has.
        resources: the bundles asked for, as {"CPU": 1, "GPU": 1}.
        node_type: its name in cluster.yaml.
        node_availability_summary: how the last attempts to start machines went.
    """
    summary = node_availability_summary
    fit = _default_utilization_scorer(node_resources, resources, node_type, node_availability_summary=summary)
    if fit is None:
        return None
    keeps_gpus_free, *rest = fit
    record = summary.node_availabilities.get(node_type)
    return keeps_gpus_free, record is None or record.is_available, *rest
