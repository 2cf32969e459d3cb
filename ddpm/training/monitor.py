"""The driver while workers train: it shows progress, reports checkpoints, and passes stop requests to the workers."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Self

from ddpm.training import run_state
from ddpm.training.run_state import RunStateClient
from ddpm.training.screen import Screen
from ddpm.utils.progress import printable

ShouldContinue = Callable[[Mapping[str, Any]], bool]
"""A function of the run's state: whether training continues."""

POLL_INTERVAL_S = 0.5
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class CallThread(threading.Thread):
    """A thread that runs one call, and starts at once.

    In the main thread Ray Train would install a handler for Ctrl-C, and Python would not handle signals during a call
    into Ray.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(name="ddpm-fit", daemon=True)
        self.result: object = None
        """The call's return value."""
        self.error: BaseException | None = None
        """The exception that the call raised."""
        self._call = call
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:  # of any type: for the caller
            self.error = error


class StopSignals:
    """A context that records SIGTERM (`ray job stop`, a batch system) and Ctrl-C; a second Ctrl-C interrupts."""

    signal: int | None = None
    """The first signal received."""

    def __enter__(self) -> Self:
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # After ray.init(), which installs its own handler.
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def again(self) -> str:
        """The effect of another Ctrl-C, as a part of a message."""
        return " (Ctrl-C again: stop at once)" if self.signal == signal.SIGINT else ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class DriverMonitor(StopSignals):
    """A context that monitors training.

    A signal asks the workers to stop after the current step, with a checkpoint. Before the first step the driver does
    not wait for them.

    Args:
        committed: called with the position of each new checkpoint.
        should_continue: called at each poll with the run's state; if it returns False, training ends as after a signal.
        possible: called every `resize_interval_s` with the number of workers; returns the number that is possible.
            None: the number is fixed.
    """

    def __init__(
        self,
        state: RunStateClient,
        screen: Screen,
        committed: Callable[[int], None],
        should_continue: ShouldContinue = lambda values: True,
        possible: Callable[[int], int] | None = None,
        resize_interval_s: float = 0.0,
    ) -> None:
        self.ended_early = False
        """Whether `should_continue` returned False."""
        self._state, self._screen, self._committed = state, screen, committed
        self._should_continue = should_continue
        self._possible, self._resize_interval_s = possible, resize_interval_s
        self._wait_s, self._looked_at = resize_interval_s, time.monotonic()
        self._position, self._warned, self._announced = -1, 0, False

    def __enter__(self) -> Self:
        super().__enter__()
        self._screen.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._screen.__exit__()
        super().__exit__()

    @property
    def was_asked(self) -> bool:
        """Whether training was asked to stop early."""
        return self.signal is not None or self.ended_early

    def is_before_first_step(self, values: Mapping[str, Any]) -> bool:
        """Whether a signal came before the first step, so that there is nothing to wait for."""
        return self.signal is not None and run_state.PROGRESS not in values

    def run(self, workers: threading.Thread, is_over: Callable[[Mapping[str, Any]], bool]) -> None:
        """Poll until the thread `workers` ends, or `is_over` is true of the run's state."""
        self._looked_at = time.monotonic()
        while workers.is_alive():
            workers.join(POLL_INTERVAL_S)
            if is_over(self._look()):
                return

    def _look(self) -> Mapping[str, Any]:
        if self.signal is not None and not self._announced:
            name = signal.Signals(self.signal).name
            self._state.set(run_state.STOP, name)
            self._announced = True
            line = f"stopping after this step, and storing a checkpoint of it{self.again}"
            if self.is_before_first_step(self._state.snapshot()):
                line = "stopping before the first step"
            print(f"{name}: {line}", file=sys.stderr)
        values = self._state.snapshot()
        self._screen.update(values)
        for line in values[run_state.WARNINGS][self._warned :]:
            print(printable(f"warning: {line}"), file=sys.stderr)
        self._warned = len(values[run_state.WARNINGS])
        position = values.get(run_state.COMMITTED, -1)
        if position > self._position:
            self._position = position
            self._committed(position)
        if not self.ended_early and not self._should_continue(values):
            self.ended_early = True
            self._state.set(run_state.STOP, "ended early")
        self._resize(values)
        return values

    def _resize(self, values: Mapping[str, Any]) -> None:
        """Ask the workers to leave with a checkpoint if the next group can be larger."""
        workers = values.get(run_state.WORKERS)
        is_leaving = values.get(run_state.STOP) or values.get(run_state.ENDED)
        is_early = time.monotonic() - self._looked_at < self._wait_s
        if self._possible is None or workers is None or is_leaving or is_early:
            return
        self._looked_at = time.monotonic()
        if self._possible(workers) <= workers:
            self._wait_s = self._resize_interval_s
        else:  # Ray may not know the new nodes yet (it polls every 20 s, 2.60): then the restart is useless
            self._wait_s *= 2
            self._state.set(run_state.STOP, run_state.MORE_WORKERS)
