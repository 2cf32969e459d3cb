"""The driver's side of a RunState actor."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddpm.training.run_state import PLACEMENT_GROUP, RUN, RunState


class RunStateClient:
    """A RunState, started on this node; the values set here survive its death.

    Attributes:
        actor: the RunState, for controller and workers.
    """

    def __init__(self, kind: type[RunState] = RunState) -> None:
        self.actor = start(kind)
        self._values: dict[str, Any] = {}

    def begin(self, run: Any) -> None:
        """Set RUN, without waiting for an actor that is still starting."""
        self._values = {RUN: run, PLACEMENT_GROUP: self._values.get(PLACEMENT_GROUP)}
        self.actor.set.remote(RUN, run)

    def set(self, subject: str, value: Any) -> None:
        """`RunState.set`."""
        ray.get(self.actor.set.remote(subject, value))
        self._values[subject] = value

    def snapshot(self) -> dict[str, Any]:
        """All values by subject; a restarted actor gets the last known ones first."""
        values = ray.get(self.actor.snapshot.remote())
        if RUN not in values:
            values = ray.get(self.actor.restore.remote(self._values))
        self._values = values
        return dict(values)


def start(kind: type[RunState] = RunState) -> Any:
    """Create a RunState on this node; it lives as long as this process, and is restarted if it dies."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(num_cpus=0)(kind).options(**options).remote()
