"""The repository's cluster files, as tests launch them: a small overlay on the file a user edits."""

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from support.hosts import Host, Hosts
from support.processes import REPO, Background

DASHBOARD = "http://127.0.0.1:8265"
FIRST_STEP = re.compile(r"^images [1-9]", re.MULTILINE)
"""What a training run's output says then."""


def overlaid(config: Any, overlay: Mapping[str, Any]) -> Any:
    """`config` with the values of `overlay` in it, mapping by mapping; None takes a key away."""
    merged = dict(config)
    for key, value in overlay.items():
        if value is None:
            del merged[key]
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = overlaid(merged[key], value)
        else:
            merged[key] = value
    return merged


def cluster_file(name: str) -> Any:
    """A cluster file of the repository."""
    return yaml.safe_load((REPO / name).read_text())


def environment(folder: Path, settings: Mapping[str, str]) -> Path:
    """infra/cluster.env, edited: `settings` are added."""
    edited = folder / "cluster.env"
    lines = [f"export {name}={value}\n" for name, value in settings.items()]
    edited.write_text((REPO / "infra/cluster.env").read_text() + "".join(lines))
    return edited


def install(host: Host) -> None:
    """Packages are there already, as after an earlier `ray up`: pip has no way out to fetch them."""
    venv = host.home / "ddpm/venv"
    venv.mkdir(parents=True)
    for entry in Path(sys.prefix).iterdir():
        (venv / entry.name).symlink_to(entry)
    (venv / "requirements.txt").write_text((REPO / "infra/requirements.txt").read_text())


class Desk:
    """Where a user sits: a host with the repository, who launches the cluster of a file and takes it down again.

    Args:
        host: the desk.
        config: the cluster file's content.
        env: for what is typed there.
    """

    def __init__(self, hosts: Hosts, config: Any, env: Mapping[str, str] | None = None) -> None:
        self.host, self.file = hosts.add("desk"), hosts.folder / "cluster.yaml"
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        }
        self.file.write_text(yaml.safe_dump(config))

    def type(self, *command: object, timeout_s: float = 600) -> str:
        """Run a command, which must work; returns what it says."""
        done = self.host.run(*command, env=self.env, timeout_s=timeout_s)
        assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def make_token(self) -> None:
        self.type("bash", "-c", "ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token")

    def up(self) -> str:
        self._up_at = time.monotonic()
        return self.type("ray", "up", "-y", self.file)

    def wait_for_first_step(self, job: Background, timeout_s: float = 900) -> str:
        """Wait until the run trains; returns how long that took from `up` on, in words."""
        job.wait_for(lambda: FIRST_STEP.search(job.output), timeout_s)
        return f"ray up to first step: {time.monotonic() - self._up_at:.0f} s"

    def down(self) -> str:
        return self.type("ray", "down", "-y", self.file)

    @contextlib.contextmanager
    def dashboard(self, timeout_s: float = 180) -> Iterator[None]:
        """`ray dashboard`, kept open: the head's dashboard at DASHBOARD."""
        log = self.host.log.with_suffix(".dashboard")
        words = self.host.words("ray", "dashboard", self.file, env=self.env)
        with Background(words, log=log) as tunnel:
            tunnel.wait_for(lambda: self._listens(8265), timeout_s, poll_s=0.2)
            yield

    def submit(self, *command: object, log: Path) -> Background:
        """`ray job submit -- command`, with its output in `log`."""
        words = ["ray", "job", "submit", "--address", DASHBOARD, "--working-dir", ".", "--", *command]
        return Background(self.host.words(*words, env=self.env), log=log)

    def _listens(self, port: int) -> bool:
        return (
            self.host.run("bash", "-c", f"exec 2> /dev/null; : < /dev/tcp/127.0.0.1/{port}").returncode == 0
        )


def gone(host: Host, title: str, timeout_s: float = 300) -> bool:
    """Whether no process of the host's is called so any more, at the latest after some time."""
    deadline = time.monotonic() + timeout_s
    while host.processes(title) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not host.processes(title)
