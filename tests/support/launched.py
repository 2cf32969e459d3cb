"""The repository's cluster files as the tests launch them: a small overlay on the file that a user edits."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from support.hosts import Host, Hosts
from support.processes import REPO, Background

DASHBOARD = "http://127.0.0.1:8265"


def with_overlay(config: Any, overlay: Mapping[str, Any]) -> Any:
    """Merge `overlay` into `config`, mapping by mapping."""
    both = [key for key, value in overlay.items() if isinstance(value, Mapping) and key in config]
    return {**config, **overlay, **{key: with_overlay(config[key], overlay[key]) for key in both}}


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
        self.host = hosts.add("desk")
        self.file = hosts.folder / "cluster.yaml"
        self.env = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        self.env |= env or {}
        self.file.write_text(yaml.safe_dump(config))

    def write_credentials(self, file: str, section: str, keys: Mapping[str, str]) -> None:
        """Write a file of credentials, as MLflow and boto3 read it, into the user's home."""
        path = self.host.home / file
        path.parent.mkdir()
        lines = [f"[{section}]", *(f"{name} = {value}" for name, value in keys.items())]
        path.write_text("\n".join(lines))

    def run_checked(self, *command: object) -> None:
        """Run a command, which must succeed."""
        done = self.host.run(*command, env=self.env)
        assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"

    def up(self) -> None:
        """Launch the cluster, with a new token."""
        token = "ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token"
        self.run_checked("bash", "-c", token)
        self.run_checked("ray", "up", "-y", self.file)

    def down(self) -> None:
        self.run_checked("ray", "down", "-y", self.file)

    @contextlib.contextmanager
    def dashboard(self) -> Iterator[None]:
        """Keep `ray dashboard` open: the head's dashboard is at DASHBOARD. An error shows the autoscaler's logs."""
        log = self.host.log.with_suffix(".dashboard")
        answers = ("bash", "-c", "exec 2> /dev/null; : < /dev/tcp/127.0.0.1/8265")
        with Background(self.host.words("ray", "dashboard", self.file, env=self.env), log=log) as tunnel:
            tunnel.wait_for(lambda: self.host.run(*answers).returncode == 0, poll_s=0.2)
            try:
                yield
            except Exception:
                logs = "tail --lines 200 /tmp/ray/session_latest/logs/monitor.*"
                print(self.host.run("ray", "exec", self.file, logs, env=self.env).stdout)
                raise

    def submit(self, *command: object, log: Path) -> Background:
        """Run `ray job submit -- command`, with its output in `log`."""
        words = ["ray", "job", "submit", "--address", DASHBOARD, "--working-dir", ".", "--", *command]
        return Background(self.host.words(*words, env=self.env), log=log)
