"""Tests of the test hosts: they behave like machines, and leave nothing behind."""

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from support.hosts import HOME, Hosts, answers, missing
from support.processes import REPO

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

ALONE = """
import sys
from pathlib import Path
from support.hosts import Hosts
with Hosts(Path(sys.argv[1])) as hosts:
    print(hosts.add("alone").pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as network:
        network.add("first")
        network.add("second", env={"GREETING": "good morning"})
        yield network


def test_ssh_between_hosts(hosts: Hosts) -> None:
    """By host name, with the network's key; the remote shell has read ~/.bashrc."""
    ssh = ("ssh", "-i", hosts.key, "-o", "StrictHostKeyChecking=no", "-o", "BatchMode=yes", "second")
    done = hosts["first"].run(*ssh, "bash -c -i 'hostname; echo $GREETING'")
    assert done.stdout.split("\n")[:2] == ["second", "good morning"], done.stderr


def test_a_host_has_private_folders_and_sees_the_repository(hosts: Hosts) -> None:
    first, second = hosts["first"], hosts["second"]
    assert first.run("sh", "-c", "touch ~/mine /tmp/mine && ls /tmp/mine && ps -e | wc -l").returncode == 0
    assert (first.home / "mine").exists()
    assert second.run("ls", HOME / "mine").returncode != 0 and second.run("ls", "/tmp/mine").returncode != 0
    done = first.run("python", "-c", "import sys, ray; print(sys.prefix)")
    assert done.stdout.strip() == sys.prefix, done.stderr
    assert first.run("ls", REPO / "pyproject.toml").returncode == 0
    assert str(first.pid) not in first.run("ps", "-e", "-o", "pid=").stdout.split()
    assert first.run("sh", "-c", "ip route | grep default").returncode != 0


def test_a_revived_host_has_its_home_again(hosts: Hosts) -> None:
    second = hosts["second"]
    second.run("touch", HOME / "kept", "/tmp/lost")
    pid = second.pid
    second.kill()
    assert not psutil.pid_exists(pid) and not answers(second.address, 22)
    second.revive()
    assert second.run("ls", HOME / "kept").returncode == 0
    assert second.run("ls", "/tmp/lost").returncode != 0
    assert hosts["first"].run("bash", "-c", f": < /dev/tcp/{second.address}/22").returncode == 0


def test_hosts_end_with_the_process_that_created_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Even if that process is killed; the next network can then have the same number."""
    words = [sys.executable, "-c", ALONE, str(tmp_path_factory.mktemp("alone"))]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO / "tests", text=True
    ) as owner:
        assert owner.stdout is not None
        host = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    host.wait(30)
    with Hosts(tmp_path_factory.mktemp("next")) as network:
        assert answers(network.add("next").address, 22)
