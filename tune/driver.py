"""A trial's driver, as Ray Tune starts and watches it; and then the next trial's.

Its own room because each trial's process imports it: what proposes trials and what tells mistakes stays outside.
"""

import logging
import os
import queue
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ddpm.utils.errors import UserError
from ray import tune

from ddpm import config as configs
from ddpm.config import Config
from ddpm.data.reading import DataSet
from ddpm.search.evaluator import Evaluator
from ddpm.search.event_log import name_of
from ddpm.search.runner import News, Trained, TrialRunner
from ddpm.training import run_state
from ddpm.training.worker_group import PersistentWorkerGroup

POLL_INTERVAL_S = 1.0
LEAVING_S = 5.0
"""How long workers, and MLflow, may take to end in good order when somebody waits for it."""


@dataclass(frozen=True)
class Spec:
    """What every trial's driver is given."""

    config: Config
    """Without what the search changes; run.storage is the search's folder."""
    data_set: DataSet
    rungs: list[int]
    evaluator: Evaluator
    env: Mapping[str, str]
    parent_run_id: str | None
    verbose: bool
    state: Any
    """The RunState actor of the search: its STOP is for all trials."""


class Driver(tune.Trainable):
    """The driver of one trial after the other, with workers that stay; one call of `step` gives one news.

    News may be of the trial before, whose last verdict came when its workers were already at the next one. It needs no
    CPU to speak of; its workers have their own.
    """

    def setup(self, config: dict[str, Any], spec: Spec | None = None) -> None:
        assert spec is not None, "the search gives it"
        if not spec.verbose:
            for name in ("ray.train", "ray.data", "ray"):
                logging.getLogger(name).setLevel(logging.ERROR)
        os.environ.update(spec.env)
        if spec.config.cluster.threads_per_worker is not None:
            torch.set_num_threads(spec.config.cluster.threads_per_worker)
        self._spec, self._group = spec, PersistentWorkerGroup(spec.config, spec.verbose)
        self._news: queue.Queue[tuple[int, News]] = queue.Queue()
        self._attempt: TrialRunner | None = None
        self._next: dict[str, Any] | None = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._next = new_config  # no more than that: who dies in here is not started again (Tune 2.60)
        return True

    def step(self) -> dict[str, Any]:
        if self._next is not None:
            if self._attempt is not None:
                self._attempt.leave()
            self._attempt = self._begin(self._next)
            self._next = None
        assert self._attempt is not None, "the first trial has begun"
        while True:
            try:
                number, news = self._news.get(timeout=POLL_INTERVAL_S)
            except queue.Empty:
                if ray.get(self._spec.state.snapshot.remote()).get(run_state.STOP):
                    self._attempt.leave()
                    self._attempt.close(LEAVING_S)
                    return {"number": self._number, "left": True}
                continue
            match news:
                case Trained():
                    return {"number": number, "training_s": news.training_s}
                case UserError():  # no other try would mend it
                    return {
                        "number": number,
                        "failed": str(news),
                    }  # not "done": Tune would not tell the referee
                case BaseException():
                    raise news
                case _:
                    return {"number": number, "rung": news}

    def cleanup(self) -> None:
        if self._attempt is not None:
            self._attempt.close()
        self._group.close(LEAVING_S)

    def _begin(self, trial: dict[str, Any]) -> TrialRunner:
        spec, number = self._spec, trial["number"]
        own = configs.override(spec.config, {**trial["changes"], "run.name": name_of(number)})
        self._number = number
        return TrialRunner(
            own,
            spec.data_set,
            spec.rungs,
            spec.evaluator,
            self._group,
            lambda news: self._news.put((number, news)),
            spec.parent_run_id,
            spec.verbose,
        )
