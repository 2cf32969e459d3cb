"""A search on Ray Tune: trials run, Optuna proposes them, ASHA stops them, and the event log records all.

Tune starts and watches the trials' drivers. The trial manager (trial_manager.py) decides which trials start
and continue, so a killed search can continue: Tune's own state is in a temporary folder and is never read back.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Self

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ddpm.cluster import ray_init
from ddpm.cluster.resources import DRIVER_CPUS
from ddpm.search.config import Arguments
from ddpm.search.driver import Driver
from ddpm.search.event_log import EventLog, name_of
from ddpm.search.proposers import ListProposer, OptunaProposer
from ddpm.search.runner import Spec
from ddpm.search.setup import Setup
from ddpm.search.trial_manager import Proposer, Stopper, TrialManager
from ddpm.training import run_state
from ddpm.training.monitor import StopSignals

MAX_DEATHS = 3
"""Number of times that a trial's process may die and resume from its checkpoint; one more, and the trial has failed."""


class Scheduler(FIFOScheduler):
    """Passes results of trials from Tune to the manager, and its decisions back."""

    def __init__(self, manager: TrialManager) -> None:
        super().__init__()
        self._manager = manager

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        number, should_continue = result["number"], False  # possibly the previous trial in this slot
        if "rung" in result:
            should_continue = self._manager.evaluated(number, result["rung"])
        elif "training_s" in result:
            should_continue = not self._manager.trained(number, result["training_s"])
        elif "failed" in result:
            self._manager.failed(number, result["failed"])
        own = number == trial.config["number"]
        return TrialScheduler.CONTINUE if should_continue or not own else TrialScheduler.STOP


class Interruption(StopSignals, tune.Callback):
    """A context in which a signal stops the trials with checkpoints.

    Args:
        is_lost: whether another process has taken over the search; then trials stop as well.
    """

    def __init__(self, is_lost: Callable[[], bool]) -> None:
        self._is_lost = is_lost
        self.state = run_state.start()
        """The RunState actor from which trials read the interruption."""
        self._announced = False

    @property
    def came(self) -> bool:
        return self.signal is not None or self._is_lost()

    def __enter__(self) -> Self:
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        return super().__enter__()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restoration that is never used

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if self.came:  # at every step, since a restarted actor does not know it
            ray.get(self.state.set.remote(run_state.STOP, "the search is interrupted"))
        if self.came and not self._announced:
            self._announced = True
            if self.signal is not None:
                name = signal.Signals(self.signal).name
                print(
                    f"{name}: the trials stop after this step and store checkpoints{self.again}",
                    file=sys.stderr,
                )


class Starter(Searcher):
    """Gives Tune the manager's next trial."""

    def __init__(self, manager: TrialManager, interruption: Interruption) -> None:
        super().__init__()
        self._manager, self._interruption = manager, interruption

    def suggest(self, trial_id: str) -> Any:
        found = None if self._interruption.came else self._manager.next()
        return Searcher.FINISHED if found is None else {"number": found[0], "changes": found[1]}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None: ...


class Deaths(tune.Callback):
    """Fails trials whose process died too often."""

    def __init__(self, manager: TrialManager) -> None:
        self._manager = manager

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._manager.failed(trial.config["number"], f"its process died more than {MAX_DEATHS} times")


class Asha:
    """Asynchronous successive halving: the best 1 / reduction_factor of the trials seen at a rung so far continue."""

    def __init__(self, rungs: list[int], reduction_factor: int) -> None:
        self._asha = AsyncHyperBandScheduler(
            time_attr="images_seen",
            metric="value",
            mode="min",
            max_t=rungs[-1],
            grace_period=rungs[0],
            reduction_factor=reduction_factor,
        )
        self._known: set[int] = set()

    def should_continue(self, number: int, images_seen: int, value: float) -> bool:
        trial: Any = SimpleNamespace(trial_id=name_of(number))
        controller: Any = None
        if number not in self._known:
            self._known.add(number)
            self._asha.on_trial_add(controller, trial)
        result = {"images_seen": images_seen, "value": value}
        return bool(self._asha.on_trial_result(controller, trial, result) == TrialScheduler.CONTINUE)


class NeverStop:
    def should_continue(self, number: int, images_seen: int, value: float) -> bool:
        return True


def manager(chosen: Arguments, search: Setup, events: EventLog, news: Callable[[str], None]) -> TrialManager:
    """The trial manager of a search, with the state of its events."""
    proposer: Proposer
    if chosen.searcher == "optuna":
        proposer = OptunaProposer(search.space, chosen.seed)
    else:
        grid_points = chosen.grid_points if chosen.searcher == "grid" else None
        proposer = ListProposer(search.space, chosen.seed, grid_points)
    halves = chosen.scheduler == "asha" and len(search.rungs) > 1
    stopper: Stopper = Asha(search.rungs, chosen.reduction_factor) if halves else NeverStop()
    return TrialManager(events, proposer, stopper, chosen.metric, chosen.num_trials, search.rungs[-1], news)


def run(manager: TrialManager, spec: Spec, max_concurrent: int, interruption: Interruption) -> None:
    """Run what is left of the manager's trials on the connected Ray cluster, `max_concurrent` at a time.

    When a driver dies, the last result of its previous trial is lost; that trial gets another slot.
    """
    while not manager.is_over and not interruption.came:
        _run(manager, spec, max_concurrent, interruption)
        manager.recall()


def _run(manager: TrialManager, spec: Spec, max_concurrent: int, interruption: Interruption) -> None:
    # A trial's error is in the event log, in one line.
    level = logging.INFO if spec.verbose else logging.CRITICAL
    logging.getLogger("ray.tune").setLevel(level)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints a box at any verbosity (2.60)
    driver = tune.with_parameters(Driver, spec=spec)
    with tempfile.TemporaryDirectory(prefix="ddpm-ray-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(driver, {"CPU": DRIVER_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=Starter(manager, interruption),
                scheduler=Scheduler(manager),
                num_samples=manager.num_left,
                max_concurrent_trials=max_concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                callbacks=[Deaths(manager), interruption],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
            ),
        )
        tuner.fit()


def environment(tracking_uri: str) -> dict[str, str]:
    """Environment variables of a trial's driver, on any node."""
    settings = {name: os.environ.get(name, value) for name, value in ray_init.SETTINGS.items()}
    return settings | ray_init.worker_env() | {"MLFLOW_TRACKING_URI": tracking_uri}
