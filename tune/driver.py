"""A trial's driver, as Ray Tune starts and watches it.

Its own room because each trial's process imports it: what proposes trials and what tells mistakes stays outside.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ray import tune

from ddpm import config as configs
from ddpm.attempt import Attempt
from ddpm.config import Config, UserError
from ddpm.data.reading import DataSet
from ddpm.jury import Jury
from ddpm.trials import name_of


@dataclass(frozen=True)
class Spec:
    """What every trial's driver is given."""

    config: Config
    """Without what the search changes; run.storage is the search's folder."""
    data_set: DataSet
    rungs: list[int]
    jury: Jury
    env: Mapping[str, str]
    parent_run_id: str | None
    verbose: bool


class Driver(tune.Trainable):
    """A trial's driver: one call of `step` is one rung. It needs no CPU to speak of; its workers have their own."""

    def setup(self, config: dict[str, Any], spec: Spec | None = None) -> None:
        assert spec is not None, "the search gives it"
        if not spec.verbose:
            for name in ("ray.train", "ray.data", "ray"):
                logging.getLogger(name).setLevel(logging.ERROR)
        os.environ.update(spec.env)
        changes = {**config["changes"], "run.name": name_of(config["number"])}
        own = configs.override(spec.config, changes)
        if own.cluster.threads_per_worker is not None:
            torch.set_num_threads(own.cluster.threads_per_worker)
        self._attempt = Attempt(own, spec.data_set, spec.rungs, spec.jury, spec.parent_run_id, spec.verbose)

    def step(self) -> dict[str, Any]:
        try:
            return {"rung": self._attempt.next()}
        except UserError as error:  # no other try would mend it
            return {"failed": str(error)}  # not "done": of such a result Tune does not tell the referee

    def cleanup(self) -> None:
        self._attempt.close()
