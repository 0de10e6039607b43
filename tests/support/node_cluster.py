"""A Ray cluster of several nodes on one machine, which share nothing but the network.

    node 1 (head)   10.77.0.1 --+
    node 2          10.77.0.2 --+-- bridge 10.77.0.254
    node 3          10.77.0.3 --+

Each node has namespaces of its own for the network, for processes and for mounts. /tmp and /dev/shm
are its own; HOME, TMPDIR and the working folder lie in /tmp, under the same paths on every node and
with different contents. The installation (this checkout and its environment) is read-only.

A namespace ends with its first process, which the kernel kills when the test ends, however that
ends. So no process, interface or mount is left behind.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
PORT = 6379
HOME = Path("/tmp/home")
WORK = Path("/tmp/work")
END_LIMIT_S = 60.0
# The first process of a namespace: it collects ended processes, which lose their parents to it.
INIT = "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: signal.pause()"


def missing_for_namespaces() -> str | None:
    """Return why no namespaces can be made here, or None where they can."""
    if os.geteuid() != 0:
        return "namespaces for several nodes need root"
    for program in ("ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(program) is None:
            return f"namespaces for several nodes need the program {program}"
    trial = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"]
    done = subprocess.run(trial, capture_output=True, text=True)
    if done.returncode:
        return f"namespaces cannot be made here: {done.stderr.strip()}"
    link = ["unshare", "--net", "ip", "link", "add", "port", "type", "bridge"]
    done = subprocess.run(link, capture_output=True, text=True)
    return f"no bridge can be made here: {done.stderr.strip()}" if done.returncode else None


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node; its commands see its own network, files and processes."""

    number: int  # from 1, the head
    folder: Path  # its /tmp, as this process sees it
    init: psutil.Process
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def work(self) -> Path:
        """The working folder of its commands, as this process sees it."""
        return self.folder / WORK.relative_to("/tmp")

    @property
    def home(self) -> Path:
        """Its HOME, as this process sees it."""
        return self.folder / HOME.relative_to("/tmp")

    def command(self, *words: str, variables: Mapping[str, str] | None = None) -> list[str]:
        """Return the words that run a command on this node; `variables` join its environment."""
        enter = ["nsenter", f"--target={self.init.pid}", "--net", "--mount", "--pid", "--uts"]
        values = {**self.environment, **(variables or {})}
        pairs = [f"{name}={value}" for name, value in values.items()]
        return [*enter, "env", "-i", f"--chdir={WORK}", *pairs, *words]

    def run(
        self,
        *words: str,
        variables: Mapping[str, str] | None = None,
        timeout: float = 300,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this node, and return its output.

        Raises:
            AssertionError: it failed, and `check` is true.
        """
        command = self.command(*words, variables=variables)
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    def python(
        self,
        *words: str,
        variables: Mapping[str, str] | None = None,
        timeout: float = 300,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with arguments on this node; see `run`."""
        return self.run(sys.executable, *words, variables=variables, timeout=timeout, check=check)

    def start_ray(self, *options: str, variables: Mapping[str, str] | None = None) -> None:
        """Start Ray here: the head on node 1, and a node that joins it elsewhere."""
        own = [f"--node-ip-address={self.address}", "--num-gpus=0", "--disable-usage-stats"]
        if self.number == 1:
            own += ["--head", f"--port={PORT}", "--include-dashboard=false"]
        else:
            own += [f"--address={NETWORK}.1:{PORT}"]
        ray = str(Path(sys.executable).parent / "ray")
        self.run(ray, "start", *own, *options, variables=variables)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Return the living processes of the node whose title begins so; Ray's are `ray::...`."""
        found = []
        for process in self.init.children(recursive=True):
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found


@dataclass(frozen=True, kw_only=True)
class NodeCluster:
    """Nodes on one network; node 1 comes first."""

    nodes: list[Node]
    _switch: psutil.Process
    _boot: Callable[[int], Node]

    def cut_power(self, node: Node) -> None:
        """End a node: the others hear nothing more of it, not even that connections close."""
        _in_network(self._switch, "ip", "link", "delete", _port(node.number))
        node.init.kill()
        _wait_for_the_end([node.init])

    def boot(self, number: int) -> Node:
        """Let a node without power come back, with its address and its files, without Ray."""
        self.nodes[number - 1] = self._boot(number)
        return self.nodes[number - 1]

    @property
    def address(self) -> str:
        return f"{NETWORK}.1:{PORT}"

    def start_ray(self, *options: str, per_node: Sequence[Sequence[str]] = ()) -> None:
        """Start Ray on every node.

        Args:
            options: for each node, besides a small object store.
            per_node: further options of node 1, node 2, ...
        """
        common = ["--object-store-memory=100000000", *options]
        head, *others = [
            functools.partial(node.start_ray, *common, *(per_node[index] if per_node else ()))
            for index, node in enumerate(self.nodes)
        ]
        head()
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda start: start(), others))


@contextmanager
def node_cluster(folder: Path, nodes: int = 3) -> Iterator[NodeCluster]:
    """Make nodes without Ray, and remove them at the end.

    Args:
        folder: for the files of all nodes.
    """
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces(["--net"], ""))
        _in_network(switch, "ip", "link", "add", "bridge", "type", "bridge")
        _in_network(switch, "ip", "address", "add", f"{NETWORK}.254/24", "dev", "bridge")
        _in_network(switch, "ip", "link", "set", "bridge", "up")
        token = secrets.token_hex(16)

        def boot(number: int) -> Node:
            own = folder / f"node{number}"
            init = stack.enter_context(_node_namespaces(number, own))
            _plug_in(switch, init, number)
            environment = _environment(number, token)
            return Node(number=number, folder=own, init=init, environment=environment)

        made = [boot(number) for number in range(1, nodes + 1)]
        yield NodeCluster(nodes=made, _switch=switch, _boot=boot)


def _environment(number: int, token: str) -> dict[str, str]:
    """Return the whole environment of the commands of a node."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:"
        "/sbin:/bin",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(HOME),
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
        "NODE_NUMBER": str(number),
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # the nodes share the cores of one machine
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }


def _in_network(member: psutil.Process, *words: str) -> None:
    """Run a command in the network of a process."""
    enter = ["nsenter", f"--target={member.pid}", "--net"]
    done = subprocess.run([*enter, *words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"


def _port(number: int) -> str:
    """Return the name of a node's port at the bridge."""
    return f"port{number}"


def _plug_in(switch: psutil.Process, init: psutil.Process, number: int) -> None:
    """Connect a node to the bridge, and give it its address."""
    port = _port(number)
    peer = ["peer", "name", "eth0", "netns", str(init.pid)]
    _in_network(switch, "ip", "link", "add", port, "type", "veth", *peer)
    _in_network(switch, "ip", "link", "set", port, "master", "bridge", "up")
    _in_network(init, "ip", "link", "set", "lo", "up")
    _in_network(init, "ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
    _in_network(init, "ip", "link", "set", "eth0", "up")
    # It leads nowhere, but programs ask for it to find out the address of their machine.
    _in_network(init, "ip", "route", "add", "default", "via", f"{NETWORK}.254")


@contextmanager
def _node_namespaces(number: int, folder: Path) -> Iterator[psutil.Process]:
    """Make the namespaces of a node, with `folder` as its /tmp; yield their first process."""
    for own in (folder / "home", folder / "work"):
        own.mkdir(parents=True, exist_ok=True)
    mounts = [
        f"mount --bind {ROOT} {ROOT}",
        f"mount -o remount,bind,ro {ROOT}",
        "mount -t tmpfs tmpfs /dev/shm",
    ]
    # What lies in the /tmp of this machine stays visible to a node if it is the installation.
    installed = {ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    for directory in (one for one in installed if one.is_relative_to("/tmp")):
        inside = folder / directory.relative_to("/tmp")
        inside.mkdir(parents=True, exist_ok=True)
        mounts.append(f"mount --rbind {directory} {inside}")
    mounts.append(f"mount --rbind {folder} /tmp")
    if (cache := Path.home() / ".cache").is_dir():
        mounts.append(f"mount -t tmpfs tmpfs {cache}")
    script = "\n".join(["set -e", *mounts, f"hostname node{number}"])
    with _namespaces(["--net", "--mount", "--pid", "--uts", "--mount-proc"], script) as init:
        yield init


@contextmanager
def _namespaces(kinds: Sequence[str], script: str) -> Iterator[psutil.Process]:
    """Make namespaces, run a script in them, and yield their first process when it is done."""
    said = "ready"
    init = f'exec {sys.executable} -S -c "{INIT}"'
    shell = f"{script}\necho {said}\n{init}"
    # The kernel kills `unshare` with this process, and its child with `unshare`.
    words = ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "--fork", "--kill-child"]
    process = subprocess.Popen(
        [*words, "bash", "-c", shell], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        answer = process.stdout.readline().strip()
        assert answer == said, f"namespaces: {answer}{process.stdout.read()}"
        (child,) = psutil.Process(process.pid).children()
        yield child
    finally:
        children = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        # The kernel ends all processes of a namespace with its first, and its mounts with them.
        _wait_for_the_end(children)


def _wait_for_the_end(processes: Sequence[psutil.Process]) -> None:
    """Wait until processes have ended; a zombie has, though its parent may never ask for it."""
    deadline = time.monotonic() + END_LIMIT_S
    while any(map(_lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
