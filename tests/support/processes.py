"""Processes under test: run jobs as a user would, and kill whole process trees."""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

T = TypeVar("T")
# Otherwise a local ray.init() creates a token in ~/.ray, and a head without a token refuses it. Set here because
# the tests, the soak and the benchmarks all import this module before they import ray.
os.environ["RAY_AUTH_MODE"] = "disabled"
REPO = Path(__file__).resolve().parents[2]


def spawn(
    words: Iterable[object], *, cwd: Path = REPO, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start a command in a session of its own; `env` is added to the environment.

    It handles signals as if typed in a terminal: programs in the background of a shell ignore SIGINT, and those of
    `nohup` SIGHUP, and what they start inherits that.
    """
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT} | options
    environment = os.environ | dict(env or {})
    command = ["env", "--default-signal=INT,TERM,HUP", *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **options)


def run(
    command: Iterable[object], *, cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end, and accept any exit code.

    Raises:
        TimeoutError: it ran longer; it is killed, and the message ends with its output.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with spawn(command, cwd=cwd, env=env, text=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException as error:
            kill_tree(process)
            out, err = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                what = f"{process.args}: not done in {timeout_s:.0f} s"
                raise TimeoutError(f"{what}. The end of its output:\n{(out + err)[-4000:]}") from None
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_in_terminal(words: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output of a program whose input and output are a terminal."""
    ours, theirs = pty.openpty()
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    env = {"TERM": "xterm", "COLUMNS": "100", **(env or {})}
    with spawn(words, cwd=cwd, env=env, **terminal) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # on Linux: the other side is closed
            os.close(ours)
    return process.returncode, shown.decode()


def run_job(
    job: str, *args: object, cwd: Path = REPO, env: Mapping[str, str] | None = None, timeout_s: float = 900
) -> subprocess.CompletedProcess[str]:
    """`python jobs/{job}.py *args`, as a user types it: run_job("train", "digits", "--run.name", "a")."""
    return run([*job_command(job), *args], cwd=cwd, env=env, timeout_s=timeout_s)


def python_path(*folders: Path) -> dict[str, str]:
    """The environment of a program that finds modules in `folders` first."""
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])}


def job_command(job: str) -> list[str]:
    """The command line that starts a job, for tests that kill it halfway."""
    return [sys.executable, str(REPO / ("tune" if job == "search" else "jobs") / f"{job}.py")]


def write_checkout(folder: Path) -> Path:
    """Write the new folder with what a submitted job needs of this checkout."""
    for name in ("ddpm", "jobs", "tune"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / ".gitignore", folder)  # Ray does not upload what it names
    return folder


def kill_tree(process: subprocess.Popen[Any], grace_s: float = 0, first: int = signal.SIGTERM) -> None:
    """Kill `process`, its descendants and the rest of its session; with a grace period, `first` is sent first.

    Group and session alone would miss what Ray starts in a session of its own (the drivers of submitted
    jobs); descendants alone would miss the orphans.
    """
    family = _family(process.pid)
    if grace_s and process.poll() is None:
        process.send_signal(first)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    family |= _family(process.pid)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=60)
    process.wait(60)


def members(pid: int, title: str) -> list[psutil.Process]:
    """The processes below `pid` whose title begins with "ray::RayTrainWorker", say, or whose program is "raylet"."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()  # a process that is exiting has none
            if words and (words[0].startswith(title) or Path(words[0]).name == title):
                found.append(process)
    return found


def wait_for(
    condition: Callable[[], T],
    timeout_s: float = 300,
    poll_s: float = 0.05,
    process: subprocess.Popen[bytes] | None = None,
    log: Path | None = None,
) -> T:
    """Wait until `condition` returns a true value, also just before the end; returns that value.

    Raises:
        RuntimeError: `process` ended before.
        TimeoutError: it did not become true. Both messages end as the file `log` does.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        code = process.poll() if process else None
        is_late = time.monotonic() > deadline
        if result := condition():
            return result
        if code is not None or is_late:
            what = f"waited {timeout_s:.0f} s in vain" if code is None else f"it ended with code {code}"
            raise (TimeoutError if code is None else RuntimeError)(f"{what}. {tail(log) if log else ''}")
        time.sleep(poll_s)


def tail(log: Path) -> str:
    """The end of a process's output."""
    return f"The end of {log.name}:\n{log.read_text(errors='replace')[-4000:]}"


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
        self, words: Iterable[object], *, log: Path, cwd: Path = REPO, env: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("ab") as out:
            self.process = spawn(words, cwd=cwd, env=env, stdout=out)

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], T], timeout_s: float = 600, poll_s: float = 0.02) -> T:
        """Wait until `condition` returns a true value; it is an error if the job ends before."""
        return wait_for(condition, timeout_s, poll_s, self.process, self._log)

    def members(self, title: str) -> list[psutil.Process]:
        """The processes below this one whose command line begins with `title`."""
        return members(self.process.pid, title)

    def wait(self, timeout_s: float = 900) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not done in {timeout_s:.0f} s. {tail(self._log)}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *of_error: object) -> None:
        kill_tree(self.process)


class Job(Background):
    """A job that runs in the background of a test: `python jobs/{job}.py *args`."""

    def __init__(self, job: str, *args: object, log: Path, env: Mapping[str, str] | None = None) -> None:
        super().__init__([*job_command(job), *args], log=log, cwd=log.parent, env=env)
