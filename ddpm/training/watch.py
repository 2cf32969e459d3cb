"""The driver while workers train: it shows how far they are, and passes on what each side has to know.

It also looks out for nodes that are about to be taken away. Ray Train can, but with a process that every restart of
the workers would wait for (2.60).

Its own room because this is about people and signals, and cluster.py is about Ray.
"""

import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Self

import ray
import ray.util
from ray._private.state import state  # a driver's view of the cluster; what ray.nodes() reads, too

from ddpm.progress import Display, printable
from ddpm.training import board as boards
from ddpm.training.board import RunStateClient

GoesOn = Callable[[Mapping[str, Any]], bool]
"""From what is on the board to whether training shall go on."""

POLL_INTERVAL_S = 0.5
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def always(notes: Mapping[str, Any]) -> bool:
    return True


class Aside(threading.Thread):
    """A call in a thread of its own, which begins at once.

    Ray Train puts in a handler for Ctrl-C where it can, in the main one; and Python handles signals between two waits,
    not in the middle of a call into Ray.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(name="ddpm-fit", daemon=True)
        self.error: BaseException | None = None
        """What it raised."""
        self._call = call
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # handed to who waits, whatever it is
            self.error = error


class Watch:
    """A context in which training runs.

    SIGTERM (`ray job stop`, a batch system) and Ctrl-C ask the workers to end with the step they are in, and to
    leave a checkpoint of it; a second Ctrl-C interrupts at once. Before the first step nothing is waited for.

    Args:
        board: of the run.
        total_images: to train on in all.
        committed: told the position of each new checkpoint.
        goes_on: asked at every look, with what is on the board, whether training shall; if not, it ends as by a signal.
    """

    def __init__(
        self,
        board: RunStateClient,
        total_images: int,
        committed: Callable[[int], None],
        goes_on: GoesOn = always,
    ) -> None:
        self.signal: int | None = None
        """What asked the run to stop."""
        self.ended_early = False
        """`goes_on` said no."""
        self._board, self._total, self._committed, self._goes_on = board, total_images, committed, goes_on
        self._display = Display("images", total_images)
        self._position, self._warned, self._told = -1, 0, False
        self._place, self._nodes, self._left = None, set[str](), False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # After ray.init(), which puts in a handler of its own.
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def was_asked(self) -> bool:
        """Whether training ends before its end."""
        return self.signal is not None or self.ended_early

    def is_before_first_step(self, notes: Mapping[str, Any]) -> bool:
        """Whether a signal has come, and no step is known of: there is nothing to wait for."""
        return self.signal is not None and boards.PROGRESS not in notes

    def run(self, workers: threading.Thread, is_over: Callable[[Mapping[str, Any]], bool]) -> None:
        """Watch until `workers` is over, or what they were to do is, as far as the board says."""
        while workers.is_alive():
            workers.join(POLL_INTERVAL_S)
            if is_over(self._look()):
                return

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def _look(self) -> Mapping[str, Any]:
        if self.signal is not None and not self._told:
            name = signal.Signals(self.signal).name
            self._board.note(boards.STOP, name)
            self._told = True
            if self.is_before_first_step(self._board.read()):
                print(f"{name}: ending before the first step", file=sys.stderr)
            else:
                again = " (Ctrl-C again: at once)" if self.signal == signal.SIGINT else ""
                print(
                    f"{name}: ending with this step, and leaving a checkpoint of it{again}", file=sys.stderr
                )
        notes = self._board.read()
        if self.signal is None:
            self._look_out(notes.get(boards.PLACE))
        progress = notes.get(boards.PROGRESS)
        if progress is not None:
            detail = f"{progress.images_per_s:,.0f} images/s  loss {progress.loss:.4f}"
            self._display.update(min(progress.images_seen, self._total), detail)
        for line in notes[boards.WARNINGS][self._warned :]:
            print(printable(f"warning: {line}"), file=sys.stderr)
        self._warned = len(notes[boards.WARNINGS])
        position = notes.get(boards.COMMITTED, -1)
        if position > self._position:
            self._position = position
            self._committed(position)
        if not self.ended_early and not self._goes_on(notes):
            self.ended_early = True
            self._board.note(boards.STOP, "ended early")
        return notes

    def _look_out(self, place: Any) -> None:
        """Ask workers to stop, once, when a node of their placement group is about to be taken away."""
        if place is None:
            return
        if place != self._place:
            bundles = ray.util.placement_group_table(place)["bundles_to_node_id"]
            self._place, self._nodes, self._left = place, set(bundles.values()), False
        if not self._left and self._nodes & set(state.get_draining_nodes()):
            self._left = True
            self._board.note(boards.STOP, boards.PREEMPTION)
