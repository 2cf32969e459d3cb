"""Commands that return a value, busy neighbours, and the CPU time of processes."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil

ANSWER = "ANSWER "


def answer(value: Any) -> None:
    """Return `value`, as JSON, to the process that started this one."""
    print(ANSWER + json.dumps(value), flush=True)


def read_answer(output: str) -> Any:
    """The returned value in the output of a process; ValueError: there is no value."""
    lines = [line for line in output.splitlines() if line.startswith(ANSWER)]  # other libraries print, too
    if not lines:
        raise ValueError("there is no answer")
    return json.loads(lines[-1].removeprefix(ANSWER))


def ask(command: Sequence[str], env: Mapping[str, str] | None = None) -> Any:
    """Run a command, and get the value that it returns.

    Raises:
        RuntimeError: the command failed; the message is its standard error.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    try:
        return read_answer(done.stdout)
    except ValueError:
        raise RuntimeError(done.stderr) from None


@contextmanager
def busy(number: int) -> Iterator[None]:
    """A context in which `number` processes each keep a core busy."""
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def family(pid: int | None = None) -> Iterator[psutil.Process]:
    """A process (None: this one) and all its descendants; none if it has ended."""
    try:
        root = psutil.Process(pid or os.getpid())
        yield from [root, *root.children(recursive=True)]
    except psutil.Error:
        return


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process; 0 if it has ended."""
    try:
        times = process.cpu_times()
        return times.user + times.system
    except psutil.Error:
        return 0.0


class Watch(threading.Thread):
    """CPU time and memory of a process and all its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = pid
        self._ended = threading.Event()
        self._cpu: dict[int, float] = {}
        self.at: list[float] = []
        self.seconds: list[float] = []
        self.largest: dict[int, int] = {}

    def run(self) -> None:
        k = 0
        while not self._ended.wait(0.2):
            k += 1
            for process in family(self._root):
                try:
                    self._cpu[process.pid] = max(self._cpu.get(process.pid, 0.0), cpu_s(process))
                    if k % 5 == 0:
                        memory = process.memory_full_info().uss
                        self.largest[process.pid] = max(self.largest.get(process.pid, 0), memory)
                except psutil.Error:  # it has just ended
                    continue
            self.at.append(time.monotonic())
            self.seconds.append(sum(self._cpu.values()))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def between(self, begin: float, end: float) -> float:
        """CPU seconds."""
        return float(np.interp(end, self.at, self.seconds) - np.interp(begin, self.at, self.seconds))
