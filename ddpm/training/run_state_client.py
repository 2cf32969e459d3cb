"""The driver's side of a RunState actor."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddpm.training.run_state import RunState


class RunStateClient:
    """A RunState, started on this node. Calls raise one of failures.DEATHS once it has died.

    Attributes:
        actor: the RunState, for controller and workers.
        values: all values by subject, as they were read last.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.actor = _start({})

    def set(self, subject: str, value: Any) -> None:
        """`RunState.set`."""
        ray.get(self.actor.set.remote(subject, value))
        self.values[subject] = value

    def snapshot(self) -> dict[str, Any]:
        """All values by subject."""
        self.values = ray.get(self.actor.snapshot.remote())
        return dict(self.values)

    def renew(self, changes: Mapping[str, Any]) -> None:
        """Start another RunState, with the values that were read last, and with `changes`."""
        self.values = {**self.values, **changes}
        self.actor = _start(self.values)


def _start(values: Mapping[str, Any]) -> Any:
    """Create a RunState on this node; it lives at most as long as this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(RunState).options(scheduling_strategy=here).remote(values)
