"""Processes under test: run jobs as a user would, and kill whole process trees."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self, TypeVar

import psutil

T = TypeVar("T")
# Otherwise a local ray.init() creates a token in ~/.ray, and a head without a token refuses it. Set here because
# the tests, the soak and the benchmarks all import this module before they import ray.
os.environ["RAY_AUTH_MODE"] = "disabled"
REPO = Path(__file__).resolve().parents[2]


def run(
    command: Iterable[str | Path], *, cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 480
) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end, and accept any exit code; `env` is added to the environment.

    Raises:
        TimeoutError: it ran longer; it is killed, and the message ends with its output.
    """
    words = [str(word) for word in command]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words,
        cwd=cwd,
        env=os.environ | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException as error:
            kill_tree(process)
            out, err = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                shown = "\n".join((out + err).splitlines()[-40:])
                raise TimeoutError(
                    f"{' '.join(words)}: not done in {timeout_s:.0f} s. Its output ends:\n{shown}"
                ) from None
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def run_job(
    job: str, *args: object, cwd: Path = REPO, env: Mapping[str, str] | None = None, timeout_s: float = 480
) -> subprocess.CompletedProcess[str]:
    """`python jobs/{job}.py *args`, as a user types it: run_job("train", "digits", "--run.name", "a")."""
    return run([*job_command(job), *map(str, args)], cwd=cwd, env=env, timeout_s=timeout_s)


def python_path(*folders: Path) -> dict[str, str]:
    """The environment of a program that finds modules in `folders` first."""
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])}


def job_command(job: str) -> list[str]:
    """The command line that starts a job, for tests that kill it halfway."""
    return [sys.executable, str(REPO / ("tune" if job == "search" else "jobs") / f"{job}.py")]


def kill_tree(process: subprocess.Popen[bytes] | subprocess.Popen[str], grace_s: float = 0) -> None:
    """Kill `process`, its descendants and the rest of its session; with a grace period, SIGTERM is sent first.

    Group and session alone would miss what Ray starts in a session of its own (the drivers of submitted
    jobs); descendants alone would miss the orphans.
    """
    family = _family(process.pid)
    if grace_s and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    family |= _family(process.pid)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=10)
    process.wait(10)


def members(pid: int, title: str) -> list[psutil.Process]:
    """The processes below `pid` whose command line begins with `title`: "ray::RayTrainWorker", say."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()  # a process that is exiting has none
            if words and words[0].startswith(title):
                found.append(process)
    return found


def named(pid: int, name: str) -> list[psutil.Process]:
    """The processes below `pid` whose program is `name`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == name:
                found.append(process)
    return found


def wait_for(what: Callable[[], T], timeout_s: float = 120) -> T:
    """Wait until `what` returns a true value; returns that value."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def paused(these: Collection[psutil.Process]) -> Iterator[None]:
    """Suspend the processes `these` while the context is open, so that they make no progress."""
    for process in these:
        process.suspend()
    try:
        yield
    finally:
        for process in these:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has been killed in the meantime
                process.resume()


def program(name: str) -> str:
    """The path of a program that a Python package installed: beside the interpreter, or on the PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} is not installed; `make test` installs it")
    return path


def _family(pid: int) -> set[psutil.Process]:
    family = set()
    for process in psutil.process_iter():
        try:
            if process.pid == pid or os.getsid(process.pid) == pid:
                family |= {process, *process.children(recursive=True)}
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return family


class Background:
    """A command that runs in the background of a test, its output in a file."""

    def __init__(
        self, words: Iterable[str], *, log: Path, cwd: Path = REPO, env: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                list(words),
                cwd=cwd,
                env=os.environ | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], T], timeout_s: float = 300, poll_s: float = 0.02) -> T:
        """Wait until `condition` returns a true value; returns that value.

        Raises:
            AssertionError: the job ended before.
            TimeoutError: it did not become true; the message ends with the job's output.
        """
        deadline = time.monotonic() + timeout_s
        while not (result := condition()):
            assert self.process.poll() is None, (
                f"the job ended with {self.process.returncode}:\n{self.output}"
            )
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {timeout_s:.0f} s in vain. The job's output ends:\n{self.output[-3000:]}"
                )
            time.sleep(poll_s)
        return result

    def members(self, title: str) -> list[psutil.Process]:
        """The processes below this one whose command line begins with `title`."""
        return members(self.process.pid, title)

    def wait(self, timeout_s: float = 480) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"not done in {timeout_s:.0f} s. Its output ends:\n{self.output[-3000:]}"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *of_error: object) -> None:
        kill_tree(self.process)


class Job(Background):
    """A job that runs in the background of a test: `python jobs/{job}.py *args`."""

    def __init__(self, job: str, *args: object, log: Path, env: Mapping[str, str] | None = None) -> None:
        super().__init__([*job_command(job), *map(str, args)], log=log, cwd=log.parent, env=env)
