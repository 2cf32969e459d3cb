"""One trial of a search, in its driver: `fit`, and the evaluation of its checkpoints at rungs.

Training never waits for the evaluator, and the workers are free for the next trial before the last result exists.
Results are stored in the run's folder, from which another attempt continues.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ddpm.checkpoints import checkpoint, runs
from ddpm.checkpoints.runs import Run, Search
from ddpm.checkpoints.settings import differences
from ddpm.cluster import resources
from ddpm.config import Config
from ddpm.search.evaluator import Evaluation, Evaluator
from ddpm.search.event_log import Rung
from ddpm.search.persistent_group import PersistentWorkerGroup
from ddpm.storage.locations import Location
from ddpm.training import checkpoint_manager, run_state
from ddpm.training.fit import Origin, fit
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

POLL_INTERVAL_S = 0.25
CLOSING_S = 90.0
"""Time-out for workers that are no longer needed to leave."""
PLACEMENT_GROUP = "placement-group"
"""File of a run with the id of its workers' placement group."""


@dataclass(frozen=True)
class Trained:
    """The trial's training is over, and its workers are free."""

    training_s: float
    """Rung.training_s of the whole training."""


@dataclass(frozen=True)
class Spec:
    """Settings that all trials of a search share."""

    config: Config
    """The base config; run.storage is the search's folder."""
    rungs: list[int]
    """Images seen at which a trial is evaluated, ascending; there are checkpoints there."""
    evaluator: Evaluator
    env: Mapping[str, str]
    """Environment variables of a trial's driver, on any node."""
    preset: str
    search: Search
    verbose: bool
    """Show Ray's messages."""
    state: Any
    """The RunState actor of the search; its STOP holds for all trials."""


News = Rung | Trained | BaseException
"""An event of a trial: the result at each rung, in order; Trained, before the last of them; or an error."""


class TrialRunner:
    """Runs one trial, whose run has `config`, in background threads.

    `on_news` is called with the news; the last of them is the last rung, or an error.
    """

    def __init__(
        self, config: Config, spec: Spec, group: PersistentWorkerGroup, on_news: Callable[[News], object]
    ) -> None:
        assert config.run.name is not None, "a search names its trials"
        self._config, self._spec, self._group, self._on_news = config, spec, group, on_news
        self._run: Run = runs.open_run(config.run.name, config.run.storage)
        self._training: threading.Thread | None = None
        self._trained = threading.Event()
        self._error: BaseException | None = None
        self._wanted, self._lock = True, threading.Lock()
        self._began_at: float | None = None
        self._placement_group = ""
        self._images_seen, self._training_s = -1, 0.0
        self._timeout_s = config.run.storage_timeout_s
        threading.Thread(target=self._follow, name="ddpm-trial-runner", daemon=True).start()

    def leave(self) -> None:
        """Stop the workers, if they still train, and wait until they are free; no news come after that.

        If the trial's training is over, its last result still comes.

        Raises:
            TimeoutError: the workers do not leave.
        """
        with self._lock:
            self._wanted = self._trained.is_set()
        deadline = time.monotonic() + CLOSING_S
        while self._training is not None and self._training.is_alive():
            if self._trained.wait(POLL_INTERVAL_S):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the workers of {self._run.location.uri} did not stop")

    def close(self, timeout_s: float = CLOSING_S) -> None:
        """Stop the workers, and wait for MLflow; no more results come."""
        with self._lock:
            self._wanted = False
        if self._training is not None:
            self._training.join(timeout_s)

    # The methods below run in the threads.

    def _follow(self) -> None:
        """Evaluate each rung's checkpoint as soon as it exists; training starts at the first rung without a result."""
        try:
            for images_seen in self._spec.rungs:
                evaluated = self._evaluation(images_seen)
                if images_seen == self._spec.rungs[-1]:
                    self._wait_until_trained()
                if not self._wanted:
                    return
                self._on_news(evaluated.rung(self._training_s))
            with contextlib.suppress(OSError):
                for old in runs.checkpoints(self._run.location)[:-1]:
                    checkpoint_manager.remove(old)  # a finished trial keeps its last one
        except BaseException as error:  # of any type: for on_news
            if self._wanted:
                self._on_news(error)

    def _evaluation(self, images_seen: int) -> Evaluation:
        run = self._run.location
        with contextlib.suppress(FileNotFoundError):
            return Evaluation.read(run, images_seen, self._timeout_s)
        with self._lock:
            self._check()
            if self._training is None:
                self._training = threading.Thread(target=self._fit, name="ddpm-trial", daemon=True)
                self._training.start()
        evaluated = self._spec.evaluator.evaluate(self._checkpoint(images_seen))
        evaluated.write(run, self._timeout_s)
        return evaluated

    def _wait_until_trained(self) -> None:
        if self._training is None:
            self._announce_trained()
        while not self._trained.wait(POLL_INTERVAL_S):
            self._check()

    def _checkpoint(self, images_seen: int) -> Location:
        """The checkpoint at `images_seen`, as soon as it exists."""
        folder = self._run.location.child(checkpoint.name_at(images_seen))
        while True:
            over = self._trained.is_set()
            if self._read(folder.child(checkpoint.CHECKSUMS)) is not None:
                return folder
            self._check()
            if over:
                raise UserError(f"{folder.uri} does not exist, though training is over; it was deleted")
            time.sleep(POLL_INTERVAL_S)

    def _read(self, file: Location) -> bytes | None:
        """The content of a file; None: it does not exist."""
        try:
            return retry_io(file.read, where=file.uri, timeout_s=self._timeout_s)
        except FileNotFoundError:
            return None

    def _fit(self) -> None:
        try:
            left = self._read(self._run.location.child(PLACEMENT_GROUP))
            if left is not None:  # a killed driver of this trial left it
                resources.remove_placement_group(left.decode())
            changed = differences(self._config, self._spec.config)
            fit(
                self._config,
                self._spec.evaluator.train,
                Origin(self._spec.preset, changed, search=self._spec.search),
                verbose=self._spec.verbose,
                should_continue=self._should_continue,
                group=self._group,
                trained=self._announce_trained,
            )
            self._announce_trained()  # for a run that was already finished
        except BaseException as error:  # of any type: `_check` raises it
            self._error = error

    def _announce_trained(self) -> None:
        if not self._trained.is_set():
            if self._wanted:
                self._on_news(Trained(self._training_s))
            self._trained.set()

    def _should_continue(self, values: Mapping[str, Any]) -> bool:
        placement_group, progress = values.get(run_state.PLACEMENT_GROUP), values.get(run_state.PROGRESS)
        if placement_group is not None and placement_group.id.hex() != self._placement_group:
            self._placement_group = placement_group.id.hex()
            with contextlib.suppress(OSError):  # training does not need it
                self._run.location.child(PLACEMENT_GROUP).write(self._placement_group.encode())
        if progress is not None and progress.images_seen != self._images_seen:
            self._images_seen, now = progress.images_seen, time.monotonic()
            self._began_at = self._began_at or now
            self._training_s = now - self._began_at
        return self._wanted

    def _check(self) -> None:
        """Raise the error that ended training, or InterruptedError if the trial is no longer needed."""
        if self._error is not None:
            raise self._error
        if not self._wanted:
            raise InterruptedError
