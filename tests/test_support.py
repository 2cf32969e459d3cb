"""What would make other tests lie or hang: connections and processes that outlive their test."""

import gc
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import psutil
import pytest
from support import hosts, processes, proxy, servers

HOST = """
import sys
from pathlib import Path
from support.hosts import Hosts
with Hosts(Path(sys.argv[1])) as hosts:
    print(hosts.add("alone").pid, flush=True)
    sys.stdin.read()
"""


def test_connections_that_arrive_while_the_proxy_closes_are_closed(s3_server: servers.S3Server) -> None:
    """A connection left open would give a warning, which is an error here."""
    for _ in range(20):
        with proxy.FaultyProxy(s3_server.endpoint) as closing:
            parts = urlsplit(closing.endpoint)
            clients = [socket.create_connection((parts.hostname, parts.port)) for _ in range(8)]
        for sock in clients:
            sock.close()
    gc.collect()


def test_stop_reaches_descendants_in_sessions_of_their_own() -> None:
    popen = "subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    words = [sys.executable, "-c", f"import subprocess; print({popen}.pid, flush=True); input()"]
    with processes.spawn(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        processes.kill_tree(parent)
    processes.wait_for(lambda: not psutil.pid_exists(child))


@pytest.mark.skipif(hosts.missing() is not None, reason=hosts.missing() or "")
def test_hosts_end_with_the_process_that_created_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Even if that process is killed; the next network can then have the same number."""
    words = [sys.executable, "-c", HOST, str(tmp_path_factory.mktemp("alone"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with processes.spawn(words, cwd=processes.REPO / "tests", **pipes) as owner:
        assert owner.stdout is not None
        host = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    host.wait(120)
    with hosts.Hosts(tmp_path_factory.mktemp("next")) as network:
        first, second = network.add("first"), network.add("second")
        assert hosts.answers(second.address, 22)
        assert first.run("touch", "/tmp/mine").returncode == 0
        assert second.run("ls", "/tmp/mine").returncode != 0  # its folders are its own
