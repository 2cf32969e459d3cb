"""Workers that stay from one trial to the next: the next one begins in a second, since processes, imports and process
group exist already.
"""

import time
from collections.abc import Callable
from typing import Any

import ray

from ddpm.config import Config
from ddpm.search.run_queue import RUN, RunQueue, Task
from ddpm.training import loop, worker_group
from ddpm.training.worker_group import WorkerGroup

RUN_POLL_S = 0.1
"""Interval at which the workers ask for the next run."""
LEAVE_POLL_S = 1.0


class PersistentWorkerGroup(WorkerGroup):
    """Workers for runs that follow one another and need the same resources; they stay until `close`.

    `config` is that of any of the runs.
    """

    stays = True

    def __init__(self, config: Config, verbose: bool = False) -> None:
        super().__init__(config, verbose, RunQueue)
        self._number = 0

    def close(self, timeout_s: float) -> None:
        """Ask the workers to leave, and wait for that, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            ray.get(self.state.actor.close.remote())  # again, since the actor may die meanwhile
            if self._workers is None or not self._workers.is_alive() or time.monotonic() > deadline:
                return
            self._workers.join(LEAVE_POLL_S)

    def _begin(self, run: Any) -> None:
        self._number += 1
        self.state.forget()
        self.state.set(RUN, Task(self._number, run))

    def _main(self) -> Callable[[dict[str, Any]], None]:
        return work


def work(spec: dict[str, Any]) -> None:
    """The main function of a worker: train run after run."""
    worker_group.begin_worker(spec)
    number, ended = 0, None
    while True:
        task = ray.get(spec["state"].next_run.remote(number, ended))
        if task == "leave":
            return
        if task == "wait":
            time.sleep(RUN_POLL_S)
            continue
        number = task.number
        try:
            ended = worker_group.train_run(spec, **ray.get(task.arguments))
        except loop.NonFinite:  # all workers detect it in the same step, so the group can stay
            ended = -1
