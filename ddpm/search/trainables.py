"""A trial as Ray Tune runs it: it trains its run, and reports what the loop measured at each rung.

A trial of one worker is a function that trains in Tune's process by the plain Runtime, without Ray Train and Ray Data.
A trial of several workers is a class that drives a worker group (training/fit.py). Both resume from the run's newest
checkpoint, and first report the rungs that the run has already reached. The search's driver creates the run, writes how
it ended, and sends it to MLflow.
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
from ddpm.runs import run_folder, storage
from ddpm.runs.lock import DriverLock
from ddpm.runs.run_folder import RunFolder, Search
from ddpm.runs.settings import differences, run_name
from ddpm.training import loop, run_state
from ddpm.training.fit import Origin, facts, fit
from ddpm.training.runtime import Runtime
from ddpm.training.store import RunStore
from ddpm.utils import devices
from ddpm.utils.errors import UserError

log = logging.getLogger(__name__)

NAME = "name"
"""Key of a proposal: the name of the trial's run."""
CHANGES = "changes"
"""Key of a proposal: dotted keys of a config, and their values."""
REPEATS = "repeats"
"""Key of a proposal: the trial that it repeats with another seed, or None."""

VALUE = "value"
"""Key of a result: bits/dim; lower is better."""
IMAGES_SEEN = "images_seen"
"""Key of a result: where it was measured."""
EVALUATION = "evaluation"
"""Key of a result: everything that was measured there."""
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

    def proposal(self, changes: Mapping[str, Any], repeats: str | None = None) -> dict[str, Any]:
        """A trial with these changes as Tune passes it on; its run is named as all runs are."""
        changed = differences(override(self.config, changes), self.base)
        name = run_name(self.preset, self.base.data.images, changed)
        return {NAME: name, CHANGES: dict(changes), REPEATS: repeats}

    def config_of(self, proposal: Mapping[str, Any]) -> Config:
        return override(self.config, {**proposal[CHANGES], "run.name": proposal[NAME]})

    def origin(self, config: Config) -> Origin:
        """Where the run of a trial comes from."""
        return Origin(self.preset, differences(config, self.base), search=self.search)

    def open_run(self, proposal: Mapping[str, Any]) -> RunFolder:
        """The run of a trial, which is created if there is none."""
        config = self.config_of(proposal)
        described = facts(config, self.rungs.evaluator.train, self.origin(config))
        return run_folder.open_run(proposal[NAME], config.run.storage, described)


def result(evaluation: Evaluation) -> dict[str, Any]:
    """What a trial reports to Tune at a rung."""
    return {
        IMAGES_SEEN: evaluation.images_seen,
        VALUE: evaluation.bits_per_dim.value,
        EVALUATION: evaluation,
    }


def failure(error: UserError) -> dict[str, Any]:
    """What a trial reports to Tune if it has failed, and another attempt would fail, too."""
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


def train_trial(proposal: dict[str, Any], spec: Spec) -> None:
    """Train a trial in this process."""
    _set_log_levels(spec)
    config = spec.config_of(proposal)
    timeout_s = config.run.storage_timeout_s
    last = spec.rungs.at[-1]
    try:
        run = run_folder.existing_run(f"{config.run.storage}/{config.run.name}")
        # The process of a killed driver may still train it.
        with DriverLock(run.location, "trial", "--name", log.info, waits=True):
            recorded = rung.recorded_at(run.location, timeout_s)
            for at in recorded:
                if at < last:
                    tune.report(result(rung.read(run.location, at, timeout_s)))
            _train(config, spec, run)
            if (
                last in recorded
            ):  # a process that was killed has measured it, but may not have stored its checkpoint
                tune.report(result(rung.read(run.location, last, timeout_s)))
    except UserError as error:
        tune.report(failure(error))


def _train(config: Config, spec: Spec, run: RunFolder) -> None:
    began = run_folder.read_card(run.location).config.get("cluster", {})
    threads = began.get("threads_per_worker") or config.cluster.threads_per_worker
    if threads is not None:  # those that the trial began with: a search may continue on another machine
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


class GroupTrial(tune.Trainable):
    """A trial of several workers; `step` returns the next rung, and `cleanup` ends the workers.

    It needs hardly any CPU; its workers have their own.
    """

    def setup(self, config: dict[str, Any], spec: Spec | None = None) -> None:
        assert spec is not None, "the search gives it"
        _set_log_levels(spec)
        self._spec = spec
        self._config = spec.config_of(config)
        self._timeout_s = self._config.run.storage_timeout_s
        # The driver creates the run once this process has started.
        self._folder = storage.resolve(self._config.run.storage).child(str(self._config.run.name))
        self._num_reported = 0
        self._wanted = True
        self._error: BaseException | None = None
        self._placement_group = ""
        self._training: threading.Thread | None = None

    def step(self) -> dict[str, Any]:
        while True:
            is_over = self._training is not None and not self._training.is_alive()
            recorded = rung.recorded_at(self._folder, self._timeout_s)
            if len(recorded) > self._num_reported:
                break
            if is_over:
                return self._failed()
            self._train(POLL_INTERVAL_S)
        at = recorded[self._num_reported]
        is_last = at >= self._spec.rungs.at[-1]
        if is_last:
            self._train()  # to its end, since the checkpoint is stored after the rung
            if self._error is not None:
                return self._failed()
        self._num_reported += 1
        return {**result(rung.read(self._folder, at, self._timeout_s)), "done": is_last}

    def cleanup(self) -> None:
        self._wanted = False
        if self._training is not None:
            self._training.join()

    def _train(self, for_s: float | None = None) -> None:
        """Wait `for_s` seconds for the training (None: for its end); the first call starts it."""
        if self._training is None:
            self._training = threading.Thread(target=self._fit, name="ddpm-trial", daemon=True)
            self._training.start()
        self._training.join(for_s)

    def _failed(self) -> dict[str, Any]:
        """The result of a trial with a UserError; any other error is raised, and Tune starts the trial again."""
        if isinstance(self._error, UserError):
            return {**failure(self._error), "done": True}
        raise self._error or RuntimeError(f"{self._folder.uri}: training ended before its last rung")

    def _fit(self) -> None:
        try:
            # The process of a killed driver may still train it.
            with DriverLock(
                self._folder, "trial", "--name", log.info, waits=True, is_wanted=lambda: self._wanted
            ):
                pass
            with contextlib.suppress(FileNotFoundError):  # it left its workers' group
                resources.remove_placement_group(self._folder.child(PLACEMENT_GROUP).read().decode())
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

    def _should_continue(self, values: Mapping[str, Any]) -> bool:
        placement_group = values.get(run_state.PLACEMENT_GROUP)
        if placement_group is not None and placement_group.id.hex() != self._placement_group:
            self._placement_group = placement_group.id.hex()
            with contextlib.suppress(OSError):  # training does not need it
                self._folder.child(PLACEMENT_GROUP).write(self._placement_group.encode())
        return self._wanted


def _set_log_levels(spec: Spec) -> None:
    """Hide Ray's own messages in this process, unless they are wanted."""
    if not spec.verbose:
        for name in ("ray.train", "ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
