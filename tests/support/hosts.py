"""Hosts with ssh for cluster tests: Linux namespaces of this machine, on a private network.

A host has its own address and name, its own processes, an empty home, /tmp, /run and /dev/shm, and an sshd that
accepts root with `key`. It sees this machine's programs, this repository and its environment, and cannot reach the
internet.

A killed test needs no cleanup: a host ends with the process that created it, and its mounts and its network cable
go with it. Only an empty bridge is left, which the next `Hosts` removes.
"""

import os
import pwd
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import psutil

from support import processes
from support.processes import REPO

PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "rsync": "rsync",
    "unshare": "util-linux",
}
"""Programs that hosts need -> the Debian package that contains them."""
HOME = Path(pwd.getpwuid(os.geteuid()).pw_dir)
PRIVATE = (HOME, Path("/tmp"), Path("/run"), Path("/dev/shm"))
"""Folders that are empty on a new host."""
NETWORKS = range(100)
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""This environment's programs first, then the system's and the administrator's."""

# The boot script of a host. /mnt keeps this machine's files reachable while the private folders are mounted over;
# the line on stdin arrives when the network cable is connected.
BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt && mkdir /mnt/old && mount --rbind / /mnt/old
for folder in {private}; do mount -t tmpfs -o mode=1777 tmpfs $folder; done
mount --bind /mnt/old{disk} {home}
for folder in {kept}; do mkdir -p $folder; mount --bind /mnt/old$folder $folder; done
mount --bind /mnt/old{folder}/hosts /etc/hosts
mkdir -p /run/sshd
umount --lazy /mnt
hostname {name}
read -r
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
exec $(command -v sshd) -D -e -f /dev/null -h {folder}/key -o ListenAddress={address} -o StrictModes=no \
    -o AuthorizedKeysFile={folder}/key.pub -o UsePAM=no -o PidFile=none -o MaxStartups=100
"""


def missing() -> str | None:
    """Why hosts cannot be created here; None if they can."""
    if os.geteuid():
        return "hosts are made of namespaces, which root alone may make"
    lacking = [package for program, package in PROGRAMS.items() if shutil.which(program, path=PATH) is None]
    if lacking:
        return f"`apt-get install {' '.join(lacking)}` brings what hosts are made with"
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
    )
    return f"this machine makes no namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Hosts:
    """A network and its hosts; a context manager.

    Args:
        folder: holds their disks, keys and logs; the only folder in /tmp that all hosts see.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hosts = dict[str, Host]()
        self.key = folder / "key"
        """The private key that opens every host."""
        self._lock, number = _own_network()
        self.network = f"10.231.{number}.0/24"
        self._bridge = f"ddpm{number}"
        self._addresses = (f"10.231.{number}.{i}" for i in range(10, 250))
        self.gateway = f"10.231.{number}.1"
        """This machine's address in the network: hosts reach what listens on it."""

    def __enter__(self) -> Self:
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n")
        self._remove_bridge()  # left by an earlier run that was killed
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "address", "add", f"{self.gateway}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for host in self._hosts.values():
            host.kill()
        self._remove_bridge()
        self._lock.close()

    def add(self, name: str, env: Mapping[str, str] | None = None) -> "Host":
        """Add and start a host; its shells have `env` and the PATH of this environment."""
        address = next(self._addresses)
        cable = f"{self._bridge}-{len(self._hosts)}"
        with (self.folder / "hosts").open("a") as file:
            file.write(f"{address} {name}\n")
        self._hosts[name] = host = Host(self, name, address, cable)
        exports = {"PATH": PATH, **(env or {})}
        lines = [f"export {variable}={shlex.quote(value)}\n" for variable, value in exports.items()]
        (host.home / ".bashrc").write_text("".join(lines))
        host.start()
        return host

    def plug(self, cable: str, address: str, pid: int) -> None:
        """Connect the network namespace of process `pid`; inside, the interface is called eth0."""
        # The same hardware address each time, since other hosts cache it.
        hardware = ":".join(["02:00", *(f"{int(part):02x}" for part in address.split("."))])
        peer = ("peer", "name", "eth0", "address", hardware, "netns", str(pid))
        _run("ip", "link", "add", cable, "type", "veth", *peer)
        _run("ip", "link", "set", cable, "master", self._bridge, "up")

    def _remove_bridge(self) -> None:
        subprocess.run(["ip", "link", "delete", self._bridge], stderr=subprocess.DEVNULL)


class Host:
    """One machine; made by `Hosts.add`."""

    def __init__(self, hosts: Hosts, name: str, address: str, cable: str) -> None:
        self.name = name
        self.address = address
        self.log = hosts.folder / f"{name}.log"
        self.home = hosts.folder / f"{name}.disk"
        """Path of its home folder on this machine."""
        self._hosts = hosts
        self._cable = cable
        self._process: subprocess.Popen[bytes] | None = None
        self.home.mkdir(0o700)

    def start(self, timeout_s: float = 180.0) -> None:
        """Start it, and wait until ssh answers."""
        folder = self._hosts.folder
        seen = {REPO, Path(sys.prefix), Path(sys.base_prefix), folder}
        kept = sorted(path for path in seen if any(path.is_relative_to(private) for private in PRIVATE))
        script = BOOT.format(
            private=_words(PRIVATE),
            kept=_words(kept),
            disk=self.home,
            home=HOME,
            folder=folder,
            name=self.name,
            address=self.address,
        )
        # setpriv: the host and its descendants are killed when this process ends, however it ends.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--kill-child", "--fork", "--mount-proc"]
        command += ["--mount", "--net", "--uts", "--ipc", "--pid", "bash", "-c", script]
        with self.log.open("ab") as log:
            self._process = process = processes.spawn(command, stdin=subprocess.PIPE, stdout=log)
        try:
            first = psutil.Process(process.pid)
            processes.wait_for(first.children, timeout_s, 0.02, process, self.log)
            self._hosts.plug(self._cable, self.address, self.pid)
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.close()
            processes.wait_for(lambda: answers(self.address, 22), timeout_s, 0.02, process, self.log)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Cut its network and kill all its processes at once."""
        if self._process is not None:
            subprocess.run(["ip", "link", "delete", self._cable], stderr=subprocess.DEVNULL)
            first = psutil.Process(self._process.pid).children() if self._process.poll() is None else []
            self._process.kill()
            self._process.wait()
            psutil.wait_procs(first, timeout=120)  # the kernel reaps it after all others
            self._process = None

    @property
    def pid(self) -> int:
        """Its first process, as a PID of this machine."""
        assert self._process is not None, f"{self.name} is off"
        return psutil.Process(self._process.pid).children()[0].pid

    def run(
        self, *command: object, env: Mapping[str, str] | None = None, timeout_s: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host, in the repository."""
        return processes.run(self.words(*command, env=env), cwd=REPO, timeout_s=timeout_s)

    def words(self, *command: object, env: Mapping[str, str] | None = None) -> list[str]:
        """The command line that runs a command on the host."""
        settings = {"HOME": str(HOME), "PATH": PATH, **(env or {})}
        words = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--uts", "--ipc", "--pid"]
        words += ["env", "--chdir", str(REPO), *(f"{name}={value}" for name, value in settings.items())]
        return [*words, *map(str, command)]

    def processes(self, title: str) -> list[psutil.Process]:
        """Its processes whose command line begins with `title`: "ray::RayTrainWorker", say."""
        return processes.members(self.pid, title)


def _own_network() -> tuple[socket.socket, int]:
    """Reserve a network number for this test run, by a socket that is closed when the process ends."""
    for number in NETWORKS:
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0ddpm-hosts-{number}")
        except OSError:
            lock.close()
        else:
            return lock, number
    raise RuntimeError(f"all {len(NETWORKS)} networks are taken")


def answers(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def _words(paths: Iterable[Path]) -> str:
    return " ".join(shlex.quote(str(path)) for path in paths)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
