"""A run's metrics as gauges for Prometheus, through Ray's public `ray.util.metrics`.

Every node of a Ray cluster exports the gauges of its processes. The driver sets these, since it outlives the workers:
`train/images_per_s` is `ray_ddpm_train_images_per_s`, labelled with the run. Setting a gauge takes microseconds and
blocks nothing.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ray.util.metrics import Gauge

from ddpm.training import run_state


class Gauges:
    """The gauges of one run; they end after the last `update`, since Ray 2.60 drops a gauge that is not set again.

    Args:
        images_seen: position of the run until its workers report one.
        waiting: returns the number of checkpoints whose curves MLflow does not have yet; None: nothing is sent.
    """

    def __init__(
        self, run: str, total_images: int, images_seen: int, waiting: Callable[[], int | None]
    ) -> None:
        self._run = {"run": run}
        self._waiting = waiting
        self._position = {"images_seen": images_seen, "total_images": total_images}
        self._gauges: dict[str, Gauge] = {}

    def update(self, values: Mapping[str, Any]) -> None:
        """Set every gauge from `values`, those of the run's RunState."""
        if progress := values.get(run_state.PROGRESS):
            self._position["images_seen"] = progress.images_seen
        workers = values.get(run_state.WORKERS) or 0
        newest = self._position | {"workers": workers}
        waiting = self._waiting()
        if waiting is not None:
            newest["mlflow_checkpoints_behind"] = waiting
        metrics = values.get(run_state.METRICS, {})
        newest |= {name: points[-1][1] for name, points in metrics.items()}
        for name, value in newest.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge("ddpm_" + re.sub(r"\W", "_", name), name, ("run",))
            self._gauges[name].set(float(value), self._run)
