"""Joining a Ray cluster, or starting one on this machine, and the cluster's resources."""

import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import ray

from ddpm.utils import openmp, strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import error_line

KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    # Training runs in a thread; threads' own arenas return memory to the system whatever the other two values are.
    "MALLOC_ARENA_MAX": "1",
}
"""With these the C library (glibc) keeps freed memory for the next step, instead of asking the system for it again,
page by page: on CPUs that is a tenth of a step. It reads them when a process starts."""

SETTINGS = {
    **KEPT_MEMORY,
    # Interval at which Ray Train's controller polls its workers (default 2 s).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # A worker group without resources retries after this time, perhaps with fewer workers (default 60 s).
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # Workers of a cluster started here have the priority of any other process, not a lower one.
    "RAY_worker_niceness": "0",
}
"""Variables of Ray and the C library for faster recovery from a crash and faster steps; values in the environment take
precedence."""

API_SERVER = "RAY_API_SERVER_ADDRESS"
NO_API_SERVER = "http://127.0.0.1:9"
"""An address that refuses connections, for a cluster started here, which has no dashboard. Ray Train would ask the
dashboard of another cluster on this machine, which does not list our controller. It would then remove the workers, as
those of a dead controller (Ray 2.60)."""

TOKEN = Path("~/.ray/auth_token")
"""Ray's file with the token of a cluster: whoever reads it can run programs there."""

REACH_TIMEOUT_S = 8.0
"""Time-out for an answer from a running cluster; Ray itself tries for minutes, or for ever."""
HTTP2_SETTINGS = b"\x04"
"""The type of a frame, its fourth byte of nine."""
HTTP2_FRAME = bytes(3) + HTTP2_SETTINGS + bytes(5)
"""An empty SETTINGS frame."""
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HTTP2_FRAME
"""What a client of HTTP/2 sends first."""

VITAL = ("gcs_server", "raylet")
"""Processes that a cluster started here cannot work without."""

LIMITS = "DDPM_CLUSTER_RESOURCES"
"""The variable with the limits of a cluster that grows: '{"CPU": 48, "GPU": 4}'. Ray 2.60 does not report them."""


class NoCluster(UserError):
    """Ray did not start, or could not be joined."""

    exit_code = 1


def connect(verbose: bool = False) -> None:
    """Join the Ray cluster of the environment (RAY_ADDRESS, or `ray start` on this machine), or start one here."""
    if ray.is_initialized():
        return
    openmp.bound_spinning()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    address = _running_cluster()
    is_without_dashboard = address is None and API_SERVER not in os.environ
    if is_without_dashboard:
        os.environ[API_SERVER] = NO_API_SERVER
    level = logging.INFO if verbose else logging.ERROR
    try:
        with _hangups_ignored():
            ray.init(
                # Without an address Ray would join the cluster of `ray start`, dead or alive.
                address=address or "local",
                log_to_driver=verbose,
                logging_level=level,
                include_dashboard=False,
            )
    except Exception as error:  # Ray raises various types: RuntimeError, ConnectionError, plain Exception
        raise _no_cluster(address, error) from error
    finally:  # the cluster's processes have inherited it
        if is_without_dashboard:
            del os.environ[API_SERVER]
    with suppress(OSError):  # Ray creates it with the umask's mode, which lets everybody read it (Ray 2.60)
        TOKEN.expanduser().chmod(0o600)
    started = [child for child in psutil.Process().children() if child.name() in VITAL]
    if not started:  # for Ray's API and dashboard to show Ray Train's state
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    else:  # a cluster of one machine has no node to lose; every worker group would start a watcher
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        threading.Thread(target=_exit_with, args=(started,), name="ddpm-ray", daemon=True).start()
    for name in ("ray.train", "ray.data", "ray"):
        logging.getLogger(name).setLevel(level)


def temp_dir() -> Path:
    """The joined cluster's folder for temporary files on this machine."""
    return Path(ray.get_runtime_context().get_temp_dir()).resolve()


@contextmanager
def _hangups_ignored() -> Iterator[None]:
    """A context whose child processes ignore SIGHUP: a closed terminal stops the driver, which stops the workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, handler)


def worker_env() -> dict[str, str]:
    """Variables that a computing process needs when it starts: `env_vars` of a runtime environment.

    Processes of a cluster that ran before `connect` do not inherit them from this process.
    """
    return {name: os.environ[name] for name in (*KEPT_MEMORY, *openmp.VARIABLES) if name in os.environ}


def _exit_with(processes: list[psutil.Process]) -> None:
    """Exit with an error line as soon as one of these dies; Ray exits up to a minute later, with a C++ error."""
    select.select([os.pidfd_open(process.pid) for process in processes], [], [])
    if ray.is_initialized():
        here = "the Ray cluster on this machine is gone: one of its processes has died"
        print(f"error: {here}; run the same command again to resume", file=sys.stderr, flush=True)
        os._exit(NoCluster.exit_code)


def _running_cluster() -> str | None:
    """The address of the cluster to join, which answers; None: there is none, and one is to be started here."""
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return None
    address = named
    if named in ("", "auto"):
        address = _address_of_ray_start() or named
    try:
        _reach(address)
    except ConnectionRefusedError as error:
        if named:
            raise _no_cluster(address, error) from error
        print(
            f"cluster     none is left at {address}, where `ray start` put one: Ray starts on this machine "
            "(`ray stop` makes it forget that address)",
            flush=True,
        )
        return None
    except OSError as error:
        raise _no_cluster(address, error) from error
    if address and not named:
        # Ray tries for half a minute to reach another process of the cluster, and keeps the interpreter busy meanwhile.
        print(
            f"cluster     joins {address}, where `ray start` put one; `ray stop --force` ends it", flush=True
        )
    return address or None


def _no_cluster(address: str | None, error: Exception) -> NoCluster:
    """The error line for a cluster that cannot be joined at `address`; None: for one that did not start here."""
    reason = error_line(error)
    if address is None:
        return NoCluster(
            f"Ray did not start on this machine: {reason}; if the machine is busy or short of memory, try again later"
        )
    if address == os.environ.get("RAY_ADDRESS"):
        return NoCluster(f"the Ray cluster at RAY_ADDRESS={address} cannot be joined: {reason}")
    return NoCluster(
        f"the Ray cluster at {address}, where `ray start` put one, cannot be joined: {reason}; "
        "`ray stop --force` ends it, and the same command then starts its own"
    )


def _address_of_ray_start() -> str | None:
    """The address of the cluster that `ray start` started or joined last on this machine, which ray.init would join.

    Ray keeps it in /tmp/ray/ray_current_cluster, as ray.init's documentation says, or in that of RAY_TMPDIR or TMPDIR.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _reach(address: str) -> None:
    """Raise OSError if Ray does not answer at a host:port; other forms of an address are left to Ray.

    The kernel accepts connections for a process that hangs, and another program may listen where a cluster was. A
    server of gRPC, as Ray's are, begins with a SETTINGS frame of HTTP/2 (RFC 9113, 3.4 and 6.5).
    """
    where = urlsplit(address if "://" in address else f"//{address}")
    if not where.hostname or not where.port:
        return
    with socket.create_connection((where.hostname, where.port), timeout=REACH_TIMEOUT_S) as connection:
        if os.environ.get("RAY_USE_TLS") == "1":  # it waits for a handshake
            return
        connection.sendall(HTTP2_PREFACE)
        frame_type = connection.recv(9)[3:4]
    if frame_type != HTTP2_SETTINGS:
        raise ConnectionRefusedError("another program than Ray listens there")


def resources() -> dict[str, float]:
    """Resources of the joined cluster, or its limits where these are higher: {"CPU": 48.0, "GPU": 4.0}."""
    have = ray.cluster_resources()
    may_have = limits()
    return {name: max(have.get(name, 0.0), may_have.get(name, 0.0)) for name in have | may_have}


def reading_cpus(cpus: float) -> float:
    """CPUs of a task that reads data: 1, or half of the cluster's `cpus` if it has fewer than 2."""
    return min(1.0, cpus / 2)


def limits() -> dict[str, float]:
    """The resources up to which the cluster grows on demand; empty: it does not grow."""
    text = os.environ.get(LIMITS, "{}")
    return strict_json.parse(dict[str, float], text, f"""{LIMITS} (such as '{{"CPU": 48, "GPU": 4}}')""")
