"""A search on Ray Tune, which starts and watches the drivers of its trials.

The trial manager (trial_manager.py) decides which trials start and continue, so a killed search can continue: Tune's
own state is in a temporary folder and is never read back.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ddpm.cluster.resources import DRIVER_CPUS
from ddpm.search.driver import Driver
from ddpm.search.event_log import EventLog, Rung
from ddpm.search.runner import Spec, Trained
from ddpm.search.setup import Setup
from ddpm.search.trial_manager import OptunaProposer, TrialManager
from ddpm.training import run_state, run_state_client
from ddpm.training.monitor import StopSignals
from ddpm.utils.errors import UserError

MAX_DEATHS = 3
"""Number of times that a trial's process may die and resume from its checkpoint; one more, and the trial has failed."""


class Scheduler(FIFOScheduler):
    """Passes results of trials from Tune to the manager, and its decisions back."""

    def __init__(self, manager: TrialManager) -> None:
        super().__init__()
        self._manager = manager

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        number, should_continue = result["number"], False  # possibly the previous trial in this slot
        match result.get("news"):
            case Rung() as rung:
                should_continue = self._manager.evaluated(number, rung)
            case Trained(training_s):
                should_continue = not self._manager.trained(number, training_s)
            case UserError() as error:
                self._manager.failed(number, str(error))
        own = number == trial.config["number"]
        return TrialScheduler.CONTINUE if should_continue or not own else TrialScheduler.STOP


class Interruption(StopSignals, tune.Callback):
    """A context in which a signal, or `is_lost`, stops the trials with checkpoints.

    `tick` is called at each step of Tune's loop.
    """

    def __init__(self, is_lost: Callable[[], bool], tick: Callable[[], None] = lambda: None) -> None:
        self._is_lost, self._tick = is_lost, tick
        self.state = run_state_client.start(max_restarts=-1, max_task_retries=-1)
        """The RunState actor from which trials read the interruption."""
        self._announced = False

    @property
    def is_on(self) -> bool:
        return self.signal is not None or self._is_lost()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restoration that is never used

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._tick()
        if self.is_on:  # at every step, since a restarted actor does not know it
            ray.get(self.state.set.remote(run_state.STOP, "the search is interrupted"))
        if self.is_on and not self._announced:
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
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = None if self._interruption.is_on else self._manager.next()
        if trial is None:
            return Searcher.FINISHED
        self._numbers[trial_id], changes = trial
        return {"number": self._numbers[trial_id], "changes": changes}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            self._manager.failed(self._numbers[trial_id], f"its process died more than {MAX_DEATHS} times")


def manager(setup: Setup, events: EventLog, news: Callable[[str], None]) -> TrialManager:
    """The trial manager of a search, with the state of its events."""
    chosen, seed = setup.arguments, setup.base.train.seed
    most = max(chosen.num_trials, len(events.trials())) + 1  # one more, to see whether there are more
    proposer = OptunaProposer(setup.space, chosen.seed, chosen.searcher, chosen.grid_points, most)
    if len(proposer.grid or ()) > chosen.num_trials:
        news(
            f"warning: the grid has more points than the first {chosen.num_trials} (--num-trials), which are tried"
        )
    total, factor, seeds = (
        setup.rungs[-1],
        chosen.reduction_factor,
        range(seed + 1, seed + chosen.finalist_seeds),
    )
    given = chosen.metric, chosen.num_trials, total, factor, news, chosen.finalists, seeds
    return TrialManager(events, proposer, *given)


def run(manager: TrialManager, spec: Spec, max_concurrent: int, interruption: Interruption) -> None:
    """Run what is left of the manager's trials on the connected Ray cluster, `max_concurrent` at a time.

    When a driver dies, the last result of its previous trial is lost; that trial gets another slot.
    """
    while not manager.is_over and not interruption.is_on:
        _run(manager, spec, max_concurrent, interruption)
        manager.recall()


def _run(manager: TrialManager, spec: Spec, max_concurrent: int, interruption: Interruption) -> None:
    # A trial's error is in the event log, in one line.
    level = logging.INFO if spec.verbose else logging.CRITICAL
    logging.getLogger("ray.tune").setLevel(level)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # The new output prints a box at any verbosity (Ray 2.60).
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
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
                callbacks=[interruption],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
            ),
        )
        tuner.fit()
