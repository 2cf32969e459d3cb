"""The driver's side of a RunState actor."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddpm.training.run_state import PLACEMENT_GROUP, RunState


class RunStateClient:
    """A RunState, started on this node. Calls raise RayActorError once it has died.

    Attributes:
        actor: the RunState, for controller and workers.
        values: all values by subject, as they were read last.
    """

    def __init__(self, kind: type[RunState] = RunState) -> None:
        self._kind = kind
        self.values: dict[str, Any] = {}
        self.actor = start(kind)

    def forget(self) -> None:
        """Forget the values of the last run, except for the placement group of its workers."""
        self.values = {PLACEMENT_GROUP: self.values.get(PLACEMENT_GROUP)}

    def set(self, subject: str, value: Any) -> None:
        """`RunState.set`."""
        ray.get(self.actor.set.remote(subject, value))
        self.values[subject] = value

    def snapshot(self) -> dict[str, Any]:
        """All values by subject."""
        self.values = ray.get(self.actor.snapshot.remote())
        return dict(self.values)

    def renew(self) -> None:
        """Start another RunState, with the values that were read last."""
        self.actor = start(self._kind, self.values)


def start(kind: type[RunState] = RunState, values: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Create a RunState on this node, with `options` for Ray; it lives at most as long as this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(kind).options(scheduling_strategy=here, **options).remote(values or {})
