"""Commands with an answer, and the CPU time of processes."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil

ANSWER = "ANSWER "


def answer(value: Any) -> None:
    """Give `value`, as JSON, to the process that has asked."""
    print(ANSWER + json.dumps(value), flush=True)


def read_answer(output: str) -> Any:
    """The value in the output of a process; ValueError: there is none."""
    lines = [line for line in output.splitlines() if line.startswith(ANSWER)]  # other libraries print, too
    if not lines:
        raise ValueError("there is no answer")
    return json.loads(lines[-1].removeprefix(ANSWER))


def ask(command: Sequence[str], env: Mapping[str, str] | None = None) -> Any:
    """The answer of a process of its own.

    Raises:
        RuntimeError: it failed; with its standard error.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    try:
        return read_answer(done.stdout)
    except ValueError:
        raise RuntimeError(done.stderr) from None


def family(pid: int | None = None) -> Iterator[psutil.Process]:
    """A process (None: this one) and all that descend from it; none if it has ended."""
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
