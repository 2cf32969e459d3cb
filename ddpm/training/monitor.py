"""The driver while workers train: it shows progress, announces checkpoints, passes stop requests to the workers, and
starts them again.
"""

import atexit
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Self

from ddpm.cluster import resources
from ddpm.config.tree import Config
from ddpm.tracking.pusher import Pusher
from ddpm.training import run_state
from ddpm.training.failures import CONTROLLER, DEATHS, STATE, Done, Fail, Restart, decide, is_idle
from ddpm.training.screen import Gauges, Screen
from ddpm.training.worker_group import WorkerGroup
from ddpm.utils.progress import printable

log = logging.getLogger(__name__)

ShouldContinue = Callable[[Mapping[str, Any]], bool]
"""A function of the run's state: whether training continues."""

POLL_INTERVAL_S = 0.5
WAITING_AFTER_S = 10.0
"""Seconds without workers after which the driver prints what they wait for."""
WAITING_AGAIN_S = 60.0
"""Seconds after which it prints that again."""
LEAVING_S = 20.0
"""Time-out for Ray Train's end when a process that called `ddpm.train` exits. `ddpm train` exits by exits.leave."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """A context that records SIGTERM (`ray job stop`, a batch system), SIGHUP (a closed terminal, unless `nohup` has it
    ignored) and Ctrl-C; a second Ctrl-C interrupts."""

    signal: int | None = None
    """The first signal received."""

    def __enter__(self) -> Self:
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # After ray.init(), which installs its own handler.
            numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def again(self) -> str:
        """The end of a message that says what another Ctrl-C would do."""
        return " (Ctrl-C again: stop at once)" if self.signal == signal.SIGINT else ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class DriverMonitor(StopSignals):
    """A context that monitors training.

    A signal asks the workers to stop after the current step, with a checkpoint. Before the first step, and while there
    are no workers, `supervise` does not wait for them; the process waits up to LEAVING_S for Ray Train when it exits.

    Args:
        images_seen: position of the run before its workers start.
        should_continue: called at each poll with the run's state; if it returns False, training ends as after a signal.
    """

    def __init__(
        self,
        config: Config,
        group: WorkerGroup,
        pusher: Pusher,
        images_seen: int,
        should_continue: ShouldContinue,
    ) -> None:
        self.ended_early = False
        """Whether `should_continue` returned False."""
        self._config = config
        self._group = group
        self._state = group.state
        self._pusher = pusher
        self._images_seen = images_seen
        self._should_continue = should_continue
        batch_size = config.train.batch_size
        name = str(config.run.name)
        total_images = -(-config.train.total_images // batch_size) * batch_size
        self._screen = Screen(name, total_images, lambda: pusher.waiting)
        self._gauges = Gauges(name, total_images, images_seen, lambda: pusher.waiting)
        self._committed = -1
        self._warned = 0
        self._announced = False
        self._resize_wait_s = config.cluster.resize_interval_s
        self._resized_at = time.monotonic()
        self._is_short = True
        self._placed = False
        self._waiting_at = time.monotonic() + WAITING_AFTER_S

    def __enter__(self) -> Self:
        super().__enter__()
        self._screen.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._screen.__exit__()
        super().__exit__()

    @property
    def stop_requested(self) -> bool:
        """Whether training is to stop early."""
        return self.signal is not None or self.ended_early

    def supervise(self) -> int:
        """Keep workers running until training is done or stopped; returns images_seen.

        This takes one or more Ray Train runs: workers leave before a node is taken away, and when nodes have joined.
        """
        while True:
            workers = self._group.workers()
            self._resized_at = time.monotonic()
            died = self._watch(workers)
            if self._group.error is not None:
                died[CONTROLLER] = self._group.error
            match decide(died, self._state.values, self._config, self.stop_requested):
                case Fail(error):
                    raise error
                case Done(images_seen):
                    # After a signal the thread is still in Ray Train, and a process that exits while a thread is in a
                    # call into Ray may crash (Ray 2.60). This is called before Ray's own handler, registered earlier.
                    atexit.register(workers.join, LEAVING_S)
                    if images_seen is None:  # stopped while no step was under way
                        return max(self._images_seen, self._committed)
                    return images_seen
                case Restart(line, values):  # Ray Train does not restart a controller that died (Ray 2.60)
                    log.warning(line)
                    self._prepare_restart({run_state.ENDED: None, **values}, state_died=STATE in died)

    def _prepare_restart(self, values: Mapping[str, Any], state_died: bool) -> None:
        """Set `values` in the run's state, in another RunState if the last one has died."""
        try:
            if not state_died:
                for subject, value in values.items():
                    self._state.set(subject, value)
                return
        except DEATHS:  # the actor died after the last look
            pass
        self._state.renew(values)

    def _watch(self, workers: threading.Thread) -> dict[str, BaseException]:
        """Watch the workers until they have left, or need not be waited for; returns the RunState's death, if any."""
        try:
            while workers.is_alive():
                workers.join(POLL_INTERVAL_S)
                if self._may_leave(self._look()):
                    return {}
            self._state.snapshot()
        except DEATHS as error:
            is_stopped = False
            while workers.is_alive() and not is_stopped:  # rank 0 notices it, too
                workers.join(POLL_INTERVAL_S)
                is_stopped = self.signal is not None and is_idle(self._state.values)
            return {STATE: error}
        return {}

    def _may_leave(self, values: Mapping[str, Any]) -> bool:
        """Whether the driver need not wait until the workers have left."""
        if self._announced and is_idle(values):  # STOP was set before `values` were read
            return True
        if self.signal is None or values.get(run_state.ENDED) is None:
            return False
        return not isinstance(decide({}, values, self._config, self.stop_requested), Restart)

    def _look(self) -> Mapping[str, Any]:
        """Read the run's state, show it, and act on it."""
        if self.signal is not None and not self._announced:
            self._announce(signal.Signals(self.signal).name)
        values = self._state.snapshot()
        self._screen.update(values)
        self._gauges.update(values)
        for line in values[run_state.WARNINGS][self._warned :]:
            print(printable(f"warning: {line}"), file=sys.stderr)
        self._warned = len(values[run_state.WARNINGS])
        self._show_waiting(values)
        committed = values.get(run_state.COMMITTED, -1)
        if committed > self._committed:
            self._committed = committed
            self._pusher.notify()
        if run_state.PROGRESS in values and self.signal is None:  # not before the first step
            self._pusher.begin()
        if not self.ended_early and not self._should_continue(values):
            self.ended_early = True
            self._state.set(run_state.STOP, "ended early")
        self._resize(values)
        return values

    def _announce(self, name: str) -> None:
        """Pass the signal to the workers, and say so."""
        self._state.set(run_state.STOP, name)
        self._announced = True
        line = f"stopping after this step, and storing a checkpoint of it{self.again}"
        values = self._state.snapshot()
        if is_idle(values):
            if run_state.PROGRESS in values:
                line = "stopping now, since no workers train"
            else:
                line = "stopping before the first step"
        print(f"{name}: {line}", file=sys.stderr)

    def _show_waiting(self, values: Mapping[str, Any]) -> None:
        """Print what the workers wait for, if they have waited for it since their last step."""
        if values.get(run_state.WORKERS) is not None:
            self._is_short = True
            self._placed = True
            self._waiting_at = time.monotonic() + WAITING_AFTER_S
            return
        shortage = None
        if self._is_short or self._placed:
            shortage = resources.shortage(self._config, self._group.per_worker, self._placed)
        self._is_short = shortage is not None
        if shortage is not None and time.monotonic() >= self._waiting_at:
            self._waiting_at = time.monotonic() + WAITING_AGAIN_S
            print(f"waiting     for {shortage}", file=sys.stderr, flush=True)

    def _resize(self, values: Mapping[str, Any]) -> None:
        """Ask the workers of an elastic run to leave with a checkpoint if the next group can be larger."""
        workers = values.get(run_state.WORKERS)
        is_fixed = len(self._config.cluster.world_sizes()) == 1
        is_leaving = values.get(run_state.STOP) or values.get(run_state.ENDED)
        is_early = time.monotonic() - self._resized_at < self._resize_wait_s
        if is_fixed or workers is None or is_leaving or is_early:
            return
        self._resized_at = time.monotonic()
        if resources.possible_workers(self._config, self._group.per_worker, workers) <= workers:
            self._resize_wait_s = self._config.cluster.resize_interval_s
        else:  # Ray may not know the new nodes yet (Ray 2.60 polls every 20 s): then the restart is useless
            self._resize_wait_s *= 2
            self._state.set(run_state.STOP, run_state.MORE_WORKERS)
