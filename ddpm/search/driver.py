"""The driver of trials, one after another, as a Ray Tune trainable. Each trial's process imports this module."""

import logging
import os
import queue
from typing import Any

import ray
import torch
from ray import tune

from ddpm.config_io import override
from ddpm.search.event_log import name_of
from ddpm.search.persistent_group import PersistentWorkerGroup
from ddpm.search.runner import News, Spec, TrialRunner
from ddpm.training import run_state
from ddpm.utils.errors import UserError

POLL_INTERVAL_S = 1.0
LEAVING_S = 5.0
"""Time-out for an orderly end of workers and MLflow."""


class Driver(tune.Trainable):
    """The driver of one trial after another, with persistent workers; each call of `step` returns one event.

    The event may belong to the previous trial: its last result may come when the workers already train the next one.
    The driver needs hardly any CPU; its workers have their own.
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
        self._runner: TrialRunner | None = None
        self._next: dict[str, Any] | None = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._next = new_config  # nothing else: an actor that dies in this call is not restarted (Ray 2.60)
        return True

    def step(self) -> dict[str, Any]:
        if self._next is not None:
            if self._runner is not None:
                self._runner.leave()
            self._runner = self._begin(self._next)
            self._next = None
        assert self._runner is not None, "the first trial has begun"
        while True:
            try:
                number, news = self._news.get(timeout=POLL_INTERVAL_S)
            except queue.Empty:
                if ray.get(self._spec.state.snapshot.remote()).get(run_state.STOP):
                    self._runner.leave()
                    self._runner.close(LEAVING_S)
                    return {"number": self._number, "left": True}
                continue
            if isinstance(news, BaseException) and not isinstance(news, UserError):
                raise news  # a retry may help
            return {"number": number, "news": news}  # never "done": Tune would not tell the scheduler

    def cleanup(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._group.close(LEAVING_S)

    def _begin(self, trial: dict[str, Any]) -> TrialRunner:
        spec, number = self._spec, trial["number"]
        own = override(spec.config, {**trial["changes"], "run.name": name_of(number)})
        self._number = number
        return TrialRunner(own, spec, self._group, lambda news: self._news.put((number, news)))
