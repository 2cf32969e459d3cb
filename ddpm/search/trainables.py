"""A trial as Ray Tune runs it: it trains its run, and reports what the loop measured at each rung.

A trial of one worker is a function that trains in Tune's process by the plain Runtime, without Ray Train and Ray Data.
A trial of several workers is a class that drives a worker group (training/fit.py). Both resume from the run's newest
checkpoint, and first report the rungs that the run has already reached.
"""

import contextlib
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ray import tune

from ddpm.cluster import resources
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.evaluation import rung
from ddpm.evaluation.rung import Evaluation, Rungs
from ddpm.runs import run_folder
from ddpm.runs.lock import DriverLock
from ddpm.runs.run_folder import RunFolder, Search
from ddpm.runs.settings import differences, run_name
from ddpm.search.trials import Trial, read_trial
from ddpm.training import loop, run_state
from ddpm.training.fit import Origin, facts, fit
from ddpm.training.runtime import Runtime
from ddpm.training.store import RunStore
from ddpm.utils import devices
from ddpm.utils.errors import UserError

log = logging.getLogger(__name__)

VALUE = "value"
"""Key of a result: bits/dim; lower is better."""
IMAGES_SEEN = "images_seen"
"""Key of a result: where it was measured."""
FAILED = "failed"
"""Key of a result: why the trial has failed."""
POLL_INTERVAL_S = 0.25
PLACEMENT_GROUP = "placement-group"
"""File of a run with the id of its workers' placement group."""


@dataclass(frozen=True)
class Spec:
    """Settings that all trials of a search share."""

    config: Config
    """The config that trials change; run.storage is the search's folder."""
    preset: str
    base: Config
    """The preset's own config, from which trials are named."""
    rungs: Rungs
    search: Search
    verbose: bool

    def configured(self, changes: Mapping[str, Any]) -> Config:
        """The config of the trial with these changes; its run is named as all runs are."""
        config = override(self.config, changes)
        name = run_name(self.preset, self.base.data.images, differences(config, self.base))
        return override(config, {"run.name": name})

    def origin(self, config: Config) -> Origin:
        """Where the run of a trial comes from."""
        return Origin(self.preset, differences(config, self.base), search=self.search)


def result(evaluation: Evaluation) -> dict[str, Any]:
    """What a trial reports to Tune at a rung."""
    return {IMAGES_SEEN: evaluation.images_seen, VALUE: evaluation.bits_per_dim.value}


def failure(error: UserError) -> dict[str, Any]:
    """What a trial reports to Tune that cannot go on: to try again would not help."""
    return {IMAGES_SEEN: 0, VALUE: float("nan"), FAILED: str(error)}


class TrialRuntime(Runtime):
    """The only worker of a trial; it reports each rung to Tune once its checkpoint is stored."""

    def __init__(self, config: Config, spec: Spec, store: RunStore) -> None:
        evaluator = spec.rungs.evaluator
        super().__init__(config, evaluator.train, evaluator.held_out, store)
        self.rungs = spec.rungs
        self._trial_store = store

    def reached(self, rung: Evaluation) -> None:
        self._trial_store.flush()
        tune.report(result(rung))  # raises SystemExit if Tune stops the trial here


def train_trial(changes: dict[str, Any], spec: Spec) -> None:
    """Train the trial with these changes, in this process."""
    _set_up(spec)
    try:
        config = spec.configured(changes)
        run = open_trial(config, spec)
        # An equal proposal that is being trained is waited for.
        with DriverLock(run.location, "trial", "--name", log.info, waits=True):
            for at in rung.recorded_at(run.location, config.run.storage_timeout_s):
                tune.report(result(rung.read(run.location, at, config.run.storage_timeout_s)))
            trial = read_trial(run.location, config.run.storage_timeout_s)
            if trial is not None and trial.status == "failed":
                raise UserError(trial.reason)
            if trial is None or trial.status == "running":
                _train(config, spec, run)
    except UserError as error:
        tune.report(failure(error))


def _train(config: Config, spec: Spec, run: RunFolder) -> None:
    threads = config.cluster.threads_per_worker
    if threads is not None:
        torch.set_num_threads(threads)
    train = spec.rungs.evaluator.train
    store = RunStore(
        config,
        run,
        train.rows.fingerprint,
        hardware=devices.hardware(),
        class_names=train.manifest.class_names,
    )
    try:
        loop.train(config, TrialRuntime(config, spec, store))
        store.flush()
    except UserError:
        store.flush_on_error()
        raise
    finally:
        store.close()


def open_trial(config: Config, spec: Spec) -> RunFolder:
    """The run of a trial, in the search's folder."""
    data = spec.rungs.evaluator.train
    return run_folder.open_run(
        str(config.run.name), config.run.storage, facts(config, data, spec.origin(config))
    )


class GroupTrial(tune.Trainable):
    """A trial of several workers; `step` returns the next rung, and `cleanup` ends the workers.

    It needs hardly any CPU; its workers have their own. An equal proposal of a trial that is being trained returns the
    rungs of that one.
    """

    def setup(self, config: dict[str, Any], spec: Spec | None = None) -> None:
        assert spec is not None, "the search gives it"
        _set_up(spec)
        self._spec = spec
        self._config = spec.configured(config)
        self._timeout_s = self._config.run.storage_timeout_s
        self._run = open_trial(self._config, spec)
        self._reported: list[dict[str, Any]] = []
        self._wanted = True
        self._error: BaseException | None = None
        self._placement_group = ""
        self._training: threading.Thread | None = None

    def step(self) -> dict[str, Any]:
        while True:
            training = self._training
            is_over = training is not None and not training.is_alive()
            found = rung.recorded_at(self._run.location, self._timeout_s)
            if len(found) > len(self._reported):
                at = found[len(self._reported)]
                is_last = at >= self._spec.rungs.at[-1]
                if is_last and training is not None:
                    training.join()  # the last checkpoint
                evaluation = rung.read(self._run.location, at, self._timeout_s)
                self._reported.append(result(evaluation))
                return {**self._reported[-1], "done": is_last}
            trial = read_trial(self._run.location, self._timeout_s)
            has_ended = trial is not None and trial.status != "running"
            if is_over or has_ended:
                return {**self._ended(trial), "done": True}
            if training is None:
                self._training = threading.Thread(target=self._fit, name="ddpm-trial", daemon=True)
                self._training.start()
            self._training.join(POLL_INTERVAL_S)  # type: ignore[union-attr]

    def cleanup(self) -> None:
        self._wanted = False
        if self._training is not None:
            self._training.join()

    def _ended(self, trial: Trial | None) -> dict[str, Any]:
        """The result of a trial that has ended before its last rung.

        Args:
            trial: its outcome: if there is one, this is an equal proposal of a trial that has ended.
        """
        if trial is not None and trial.status == "failed":
            return failure(UserError(trial.reason))
        if trial is not None and trial.status == "stopped" and self._reported:
            return self._reported[-1]
        if isinstance(self._error, UserError):
            return failure(self._error)
        raise self._error or RuntimeError(f"{self._run.location.uri}: training ended before its last rung")

    def _fit(self) -> None:
        try:
            self._wait_for_equal_proposal()
            trial = read_trial(self._run.location, self._timeout_s)
            if trial is not None and trial.status != "running":
                return
            with contextlib.suppress(FileNotFoundError):  # a killed driver of this trial left its group
                resources.remove_placement_group(self._run.location.child(PLACEMENT_GROUP).read().decode())
            fit(
                self._config,
                self._spec.rungs.evaluator.train,
                self._spec.origin(self._config),
                verbose=self._spec.verbose,
                should_continue=self._should_continue,
                rungs=self._spec.rungs,
            )
        except BaseException as error:  # of any type: `step` returns or raises it
            self._error = error

    def _wait_for_equal_proposal(self) -> None:
        """Wait until no other process trains this trial; UserError if this one is not wanted any more."""
        location = self._run.location
        with DriverLock(location, "trial", "--name", log.info, waits=True, is_wanted=lambda: self._wanted):
            pass

    def _should_continue(self, values: Mapping[str, Any]) -> bool:
        placement_group = values.get(run_state.PLACEMENT_GROUP)
        if placement_group is not None and placement_group.id.hex() != self._placement_group:
            self._placement_group = placement_group.id.hex()
            with contextlib.suppress(OSError):  # training does not need it
                self._run.location.child(PLACEMENT_GROUP).write(self._placement_group.encode())
        return self._wanted


def _set_up(spec: Spec) -> None:
    """Set this process up."""
    if not spec.verbose:
        for name in ("ray.train", "ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
