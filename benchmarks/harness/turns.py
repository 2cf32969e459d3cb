"""Contestants that take turns, so that a machine that gets busy slows all equally.

`in_turns` runs each to its end. A `Contestant` is a process that is suspended between its turns.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from harness.processes import family

K = TypeVar("K")
V = TypeVar("V")

LOG = "log"
"""A contestant's output, a file in its folder."""
GAP_S = 2.0
"""A longer pause of this process is assumed to be one of the whole machine, and does not count."""
LAST_WORDS_S = 90.0
"""Seconds that a terminated contestant has to exit before it is killed."""


def in_turns(contestants: Sequence[K], repeats: int, measure: Callable[[K], V]) -> dict[K, list[V]]:
    """Results of `measure` for each contestant, `repeats` times; every other round begins with the last one."""
    found: dict[K, list[V]] = {key: [] for key in contestants}
    for i in range(repeats):
        for key in contestants if i % 2 == 0 else reversed(contestants):
            found[key].append(measure(key))
            print(f"{key}: {found[key][-1]}", flush=True)
    return found


@dataclass(frozen=True)
class Turn:
    """An interval in which a contestant ran."""

    began: float
    """Seconds since the epoch."""
    ended: float


class Contestant:
    """A command and all its processes, which run only during its turns.

    Args:
        command: started in `folder` with the first turn; its log is there, too.
        environment: the complete environment.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._command = command
        self._folder = folder
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self.turns: list[Turn] = []

    @property
    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    @property
    def failed(self) -> bool:
        """Whether the process has ended by itself, other than with exit code 0."""
        return self._process is not None and bool(self._process.poll())

    def turn(self, seconds: float) -> None:
        """Run for `seconds`, or until the process exits."""
        began = time.time()
        if self._process is None:
            with (self._folder / LOG).open("wb") as log:
                self._process = subprocess.Popen(
                    self._command, cwd=self._folder, env=self._environment, stdout=log, stderr=log
                )
        self._signal(signal.SIGCONT)
        ran = 0.0
        last = began
        while ran < seconds and not self.ended:
            time.sleep(0.1)
            now = time.time()
            if now - last > GAP_S:
                self.turns.append(Turn(began, last))
                began = now
            else:
                ran += now - last
            last = now
        self.turns.append(Turn(began, last))
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Terminate the process; kill all its processes if they are still running after LAST_WORDS_S."""
        tree = self._tree()
        self._signal(signal.SIGCONT)
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_WORDS_S)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _tree(self) -> list[psutil.Process]:
        return [] if self._process is None or self.ended else list(family(self._process.pid))

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes, including those that start meanwhile."""
        reached: set[int] = set()
        while new := [process for process in self._tree() if process.pid not in reached]:
            for process in new:
                reached.add(process.pid)
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


@contextmanager
def ended_after(contestants: Sequence[Any]) -> Iterator[None]:
    """A context that ends all contestants at exit, also after an error; each has a method `end`."""
    try:
        yield
    finally:
        for contestant in contestants:
            contestant.end()
