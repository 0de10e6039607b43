"""Ray nodes on this machine, started by `ray start` as a user would, and stopped alone.

`ray stop` would also stop every other Ray of the user. With --block a node is one process that
stops its own daemons when it gets SIGTERM.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

STARTED = "Ray runtime started."
START_LIMIT_S = 300.0
STOP_LIMIT_S = 60.0


def free_ports(count: int) -> list[int]:
    """Return ports that no process listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@dataclass(frozen=True)
class RayNode:
    """A node of a cluster, and its directory, which no other node may use."""

    process: subprocess.Popen[bytes]
    directory: Path  # its path must be short: Ray's sockets lie below it

    @classmethod
    def start(cls, script: str, directory: Path, environment: Mapping[str, str]) -> RayNode:
        """Run a shell script whose last command is `ray start ... --block`, until Ray answers.

        Raises:
            RuntimeError: Ray did not start, with what it printed.
        """
        directory.mkdir(parents=True, exist_ok=True)
        output = directory / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-ec", script],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = cls(process=process, directory=directory)
        deadline = time.monotonic() + START_LIMIT_S
        while STARTED not in output.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                node.stop()
                raise RuntimeError(f"{script}\n{output.read_text()}")
            time.sleep(0.1)
        return node

    def stop(self) -> None:
        """Stop the node and all that it started."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_LIMIT_S)
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the node: its daemons and workers name its directory."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if f"{self.directory}/" in words or process.pid == self.process.pid:
                    found.append(process)
        return found
