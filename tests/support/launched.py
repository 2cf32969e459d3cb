"""The repository's cluster files as the tests launch them: a small overlay on the file that a user edits."""

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
"""Matches the output of a training run from its first step on."""


def with_overlay(config: Any, overlay: Mapping[str, Any]) -> Any:
    """Merge `overlay` into `config`, mapping by mapping; None removes a key."""
    merged = dict(config)
    for key, value in overlay.items():
        if value is None:
            del merged[key]
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = with_overlay(merged[key], value)
        else:
            merged[key] = value
    return merged


def cluster_file(name: str) -> Any:
    """A cluster file of the repository."""
    return yaml.safe_load((REPO / name).read_text())


def environment(folder: Path, settings: Mapping[str, str]) -> Path:
    """Write an edited infra/cluster.env, with `settings` added; returns its path."""
    edited = folder / "cluster.env"
    lines = [f"export {name}={value}\n" for name, value in settings.items()]
    edited.write_text((REPO / "infra/cluster.env").read_text() + "".join(lines))
    return edited


def install(host: Host) -> None:
    """Provide the packages, as after an earlier `ray up`: pip cannot download them here."""
    venv = host.home / "ddpm/venv"
    venv.mkdir(parents=True)
    for entry in Path(sys.prefix).iterdir():
        (venv / entry.name).symlink_to(entry)
    (venv / "requirements.txt").write_text((REPO / "infra/requirements.txt").read_text())


class UserHost:
    """The user's machine: a host with the repository, from which a cluster is launched and taken down.

    Args:
        hosts: where the host is added.
        config: the cluster file's content.
        env: environment of the commands that run there.
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

    def run_checked(self, *command: object, timeout_s: float = 600) -> str:
        """Run a command, which must succeed; returns its output."""
        done = self.host.run(*command, env=self.env, timeout_s=timeout_s)
        assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def make_token(self) -> None:
        self.run_checked(
            "bash", "-c", "ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token"
        )

    def up(self) -> str:
        self._up_at = time.monotonic()
        return self.run_checked("ray", "up", "-y", self.file)

    def wait_for_first_step(self, job: Background, timeout_s: float = 900) -> str:
        """Wait for the first training step; returns a line with the time since `up`."""
        job.wait_for(lambda: FIRST_STEP.search(job.output), timeout_s)
        return f"ray up to first step: {time.monotonic() - self._up_at:.0f} s"

    def down(self) -> str:
        return self.run_checked("ray", "down", "-y", self.file)

    @contextlib.contextmanager
    def dashboard(self, timeout_s: float = 180) -> Iterator[None]:
        """Keep `ray dashboard` open: the head's dashboard is at DASHBOARD."""
        log = self.host.log.with_suffix(".dashboard")
        words = self.host.words("ray", "dashboard", self.file, env=self.env)
        with Background(words, log=log) as tunnel:
            tunnel.wait_for(lambda: self._listens(8265), timeout_s, poll_s=0.2)
            yield

    def submit(self, *command: object, log: Path) -> Background:
        """Run `ray job submit -- command`, with its output in `log`."""
        words = ["ray", "job", "submit", "--address", DASHBOARD, "--working-dir", ".", "--", *command]
        return Background(self.host.words(*words, env=self.env), log=log)

    def _listens(self, port: int) -> bool:
        return (
            self.host.run("bash", "-c", f"exec 2> /dev/null; : < /dev/tcp/127.0.0.1/{port}").returncode == 0
        )


def wait_until_gone(host: Host, title: str, timeout_s: float = 300) -> bool:
    """Wait until no process on the host has this title; returns whether that happened in time."""
    deadline = time.monotonic() + timeout_s
    while host.processes(title) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not host.processes(title)
