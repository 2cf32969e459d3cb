"""Training runs on Ray with timed steps."""

import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data import prepare_for_run, ray_stream
from ddpm.training import fit, worker_group

_work = worker_group.train_worker


def tick(folder: str) -> None:
    """Record that this process has completed a step."""
    with Path(folder, f"{os.getpid()}.ticks").open("a") as file:
        file.write(f"{time.time()}\n")


def ticks(folder: str) -> dict[str, list[float]]:
    """Times at which steps were completed, seconds since the epoch, by process."""
    return {
        path.stem: [float(line) for line in path.read_text().splitlines()]
        for path in Path(folder).glob("*.ticks")
    }


def timed_work(folder: str, spec: dict[str, Any]) -> None:
    """Training in the worker; each step of rank 0 leaves a tick in the folder."""
    from ddpm.training.worker import RayRuntime

    flags = RayRuntime.any_of
    Path(folder, f"{os.getpid()}.entered").write_text(str(time.time()))

    def timed(self: RayRuntime, *args: Any, **kwargs: Any) -> Any:
        found = flags(self, *args, **kwargs)
        if self.rank == 0:
            tick(folder)
        return found

    RayRuntime.any_of = timed  # type: ignore[method-assign]
    _work(spec)


def train(
    config: Config,
    folder: str,
    values: Mapping[str, Any],
    work: Any = timed_work,
    mlflow_uri: str | None = None,
) -> Config:
    """Train `config`, with `values` changed, on one worker as the run FOLDER/bench; returns the trained config.

    Args:
        work: what a worker runs, called with `folder` first.
        mlflow_uri: None: a database in `folder`.
    """
    os.environ["MLFLOW_TRACKING_URI"] = mlflow_uri or f"sqlite:///{folder}/mlflow.db"
    own = {"run.storage": folder, "run.name": "bench", "cluster.num_workers": 1}
    config = override(config, {**own, **values})
    config = prepare_for_run.prepared(config)
    worker_group.train_worker = partial(work, folder)
    fit.fit(config, ray_stream.open_configured(config))
    return config
