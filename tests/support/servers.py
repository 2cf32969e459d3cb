"""Real servers for tests: an S3 server, an MLflow server, a Ray head.

Each is a separate process on free loopback ports with its own folder, so two test runs fit on one machine. `start`
returns once the server answers, or raises with the tail of its log.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from support.processes import REPO, kill_tree, program, run, spawn, wait_for

if TYPE_CHECKING:
    import pytest

LOOPBACK = "127.0.0.1"
# Below the range Linux uses for outgoing connections (32768 and up), so that none takes the port before the server
# does. Each parallel pytest process has its own ports.
PORT_SHARE = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4
PORTS = range(10_000 + 2_500 * PORT_SHARE, 12_500 + 2_500 * PORT_SHARE)
UNTRIED = iter(random.SystemRandom().sample(PORTS, len(PORTS)))
GRPC_OFFSET = 10_000
SMALL_STORE = f"--object-store-memory {300 * 2**20}"


class Server:
    """A server process that answers GET `health_url` when it is up."""

    stop_signal = signal.SIGTERM

    def __init__(
        self,
        name: str,
        command: list[str],
        health_url: str,
        folder: Path,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.name = name
        self.command = command
        self.health_url = health_url
        self.folder = folder
        self.env = dict(env or {})
        self.options = options  # of subprocess
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 300) -> Self:
        """Start or restart, and wait for the first answer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = spawn(self.command, cwd=self.folder, env=self.env, stdout=log, **self.options)
        try:
            wait_for(self.is_up, timeout_s, 0.1, self.process, self.log)
        except BaseException:
            self.kill()
            raise
        return self

    def is_up(self) -> bool:
        return _get(self.health_url) is not None

    def stop(self, grace_s: float = 10) -> None:
        """Send `stop_signal`, and kill the process and all descendants that are left after `grace_s`."""
        if self.process is not None:
            kill_tree(self.process, grace_s, self.stop_signal)
            self.process = None

    def kill(self) -> None:
        """Send SIGKILL, as in a crash."""
        self.stop(grace_s=0)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()


class S3Server(Server):
    """SeaweedFS, which checks signatures as S3 does. Clients need `client_env`, or boto3's `client_options`."""

    def __init__(
        self, folder: Path, access_key: str = "lab", secret_key: str = "labsecret", host: str = LOOPBACK
    ) -> None:
        master, volume, filer, s3, admin = ports = free_ports(5)
        self.ports = [*ports, *(port + GRPC_OFFSET for port in ports)]
        self.endpoint = f"http://{host}:{s3}"
        self.keys = (access_key, secret_key)
        self.topology_url = f"http://{host}:{master}/dir/status"
        self.client_env, self.client_options = aws_client(self.endpoint, access_key, secret_key)
        # Every gRPC port is its HTTP port + 10000. Small volumes, since each bucket uses several.
        options = f"""ip={host} ip.bind={host} master.port={master} master.volumeSizeLimitMB=64 master.telemetry=false
            volume.port={volume} filer.port={filer} s3.port={s3} s3.port.iceberg=0 s3.port.lance=0
            admin.port={admin} admin.ui=false webdav=false"""
        folders = [f"dir={folder / 'data'}", f"filer.localSocket={folder / 'filer.sock'}"]
        (folder / "data").mkdir(parents=True, exist_ok=True)
        command = [program("weed"), "mini", *(f"-{option}" for option in [*folders, *options.split()])]
        super().__init__("seaweedfs", command, f"{self.endpoint}/healthz", folder, self.client_env)

    def use(self, patch: "pytest.MonkeyPatch") -> None:
        """Point boto3 and pyarrow of this process to it."""
        import boto3

        for name, value in self.client_env.items():
            patch.setenv(name, value)
        patch.setattr(boto3, "DEFAULT_SESSION", None)  # it caches the first credentials it sees

    def is_up(self) -> bool:
        # S3 answers before the volume server has reported its content to the master: until then objects are missing.
        topology = _get(self.topology_url)
        return topology is not None and json.loads(topology)["Topology"]["Max"] > 0 and super().is_up()

    def stop(self, grace_s: float = 10) -> None:
        super().stop(grace_s)
        for port in self.ports:  # seaweedfs does not remove its sockets
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink()


class MlflowServer(Server):
    """An MLflow tracking server on SQLite, with its artifacts in a folder."""

    def __init__(self, folder: Path, host: str = LOOPBACK) -> None:
        (port,) = free_ports(1)
        self.uri = f"http://{host}:{port}"
        command = [program("mlflow"), *f"server --host {host} --port {port} --workers 1".split()]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        # Job execution is only for evaluating language models, and starts seven processes.
        env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        super().__init__("mlflow", command, f"{self.uri}/health", folder, env)


class RayHead(Server):
    """A one-node Ray cluster: `address` for ray.init, `dashboard` for `ray job submit`, `metrics` for Prometheus.

    It has its own temporary folder: Ray writes the address of the last cluster started to a file there, so with the
    default folder every ray.init() on the machine would join this cluster.
    """

    def __init__(self, folder: Path, num_cpus: int = 3, env: Mapping[str, str] | None = None) -> None:
        gcs, dashboard, client, agent_http, agent_grpc, runtime_env, metrics = free_ports(7)
        self.address = f"{LOOPBACK}:{gcs}"
        self.dashboard = f"http://{LOOPBACK}:{dashboard}"
        self.metrics = f"http://{LOOPBACK}:{metrics}"
        # Short, since the sockets in it must fit into 107 characters.
        self.temp_dir = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        # Worker ports: any free ports. The default range, 10002 to 19999, is shared with the servers here.
        words = f"""start --head --block --disable-usage-stats --node-ip-address {LOOPBACK} --port {gcs}
            --dashboard-port {dashboard} --ray-client-server-port {client} --metrics-export-port {metrics}
            --dashboard-agent-listen-port {agent_http} --dashboard-agent-grpc-port {agent_grpc}
            --runtime-env-agent-port {runtime_env} --min-worker-port 0 --max-worker-port 0
            --temp-dir {self.temp_dir} --num-cpus {num_cpus} {SMALL_STORE}"""
        # Submitted jobs run `python`: it must be the interpreter that runs the tests.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        # Workers have normal priority (by default their niceness is 15), and a stopped job more than three seconds.
        settings = {"PATH": path, "RAY_worker_niceness": "0", "RAY_JOB_STOP_WAIT_TIME_S": "10", **(env or {})}
        # Ray Train must find the API server of this cluster, not of another one on this machine.
        settings["RAY_API_SERVER_ADDRESS"] = self.dashboard
        super().__init__(
            "ray", [program("ray"), *words.split()], f"{self.dashboard}/api/version", folder, settings
        )

    def submit(
        self,
        *command: object,
        env: Mapping[str, str] | None = None,
        cwd: Path = REPO,
        timeout_s: float = 900,
        options: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit ... -- command` with `cwd` as working directory; `env` reaches driver and workers."""
        words = [program("ray"), "job", "submit", "--address", self.dashboard, "--working-dir", ".", *options]
        words += ["--runtime-env-json", json.dumps({"env_vars": dict(env or {})}), "--", *map(str, command)]
        return run(words, cwd=cwd, timeout_s=timeout_s)

    def nodes(self) -> dict[str, str]:
        """Name -> ID of the nodes that the cluster considers alive."""
        summary = json.loads(_get(f"{self.dashboard}/nodes?view=summary") or b"null")
        raylets = [node["raylet"] for node in summary["data"]["summary"]] if summary else []
        return {r["nodeName"]: r["nodeId"] for r in raylets if r.get("state") == "ALIVE"}

    def add_node(self, num_cpus: int) -> "RayNode":
        return RayNode(self, num_cpus).start()

    def drain(self, node_id: str, within_s: int) -> None:
        """Announce that a node will be preempted in `within_s` seconds, as a cloud does for a spot instance."""
        words = [program("ray"), "drain-node", "--address", self.address, "--node-id", node_id]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot instance reclaimed"]
        done = run([*words, "--deadline-remaining-seconds", str(within_s)], cwd=self.folder)
        if done.returncode:
            raise RuntimeError(f"the node was not drained:\n{done.stdout}{done.stderr}")

    def stop(self, grace_s: float = 10) -> None:
        super().stop(grace_s)
        shutil.rmtree(self.temp_dir, ignore_errors=True)


class RayNode(Server):
    """One more node of a cluster, on the same machine."""

    def __init__(self, head: RayHead, num_cpus: int) -> None:
        name = f"node-{uuid.uuid4().hex[:8]}"
        words = f"""start --address {head.address} --block --num-cpus {num_cpus} --node-name {name} {SMALL_STORE}
            --min-worker-port 0 --max-worker-port 0"""
        super().__init__(name, [program("ray"), *words.split()], head.dashboard, head.folder, head.env)
        self._head = head

    def is_up(self) -> bool:
        return self.name in self._head.nodes()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def node_id(self) -> str:
        return wait_for(lambda: self._head.nodes().get(self.name, ""))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop it, and wait until the cluster has noticed, so that the next test does not see the node."""
        self.stop()
        if self._head.is_up():
            wait_for(lambda: (alive := self._head.nodes()) and self.name not in alive)


def ray_head_env() -> dict[str, str]:
    """infra/ray-head.env: the environment of a head that notices lost nodes early."""
    lines = (REPO / "infra" / "ray-head.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def aws_client(endpoint: str, access_key: str, secret_key: str) -> tuple[dict[str, str], dict[str, str]]:
    """The environment of clients of an AWS service at `endpoint`, and the same as options of boto3.client."""
    options = {"aws_access_key_id": access_key, "aws_secret_access_key": secret_key}
    env = {name.upper(): value for name, value in options.items()}
    env |= {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
    env |= {"AWS_EC2_METADATA_DISABLED": "true"}
    return env, options | {"endpoint_url": endpoint, "region_name": "us-east-1"}


def free_ports(count: int) -> list[int]:
    """`count` free ports, none of them given before; the port GRPC_OFFSET above each is free as well."""
    free = (port for port in UNTRIED if _is_free(port) and _is_free(port + GRPC_OFFSET))
    if len(ports := list(islice(free, count))) < count:
        raise RuntimeError(f"no {count} free ports in {PORTS.start}..{PORTS.stop - 1}")
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _get(url: str) -> bytes | None:
    """The body of the answer; None unless its status is 200."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return bytes(response.read()) if response.status == 200 else None
    except (OSError, HTTPException):
        return None
