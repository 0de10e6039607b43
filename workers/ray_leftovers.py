"""End what is left of a driver's own Ray when the driver has ended, in whatever way.

After SIGKILL a driver stops nothing. Ray's daemons die with it, but their agents notice only when a
connection times out, up to 90 seconds later, and workers that compute go on. The same holds for a
driver that ends because Ray's head died. So a process of its own waits for the end of the driver
and kills what the driver's Ray has started.

It knows those processes by a variable in their environment, which they inherit from Ray's daemons.
Ray's agents write their title over their environment, so the driver names them. Run as a script
this file is that process; it imports no more than it needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

MARK = "RLSYS_OWN_RAY"
# Processes that are being started have no environment yet, so it looks again.
LIMIT_S = 20.0
PAUSE_S = 0.2


class LeftoverGuard:
    """The process that waits for the end of this one."""

    def __init__(self) -> None:
        """Start it, outside of this process's session, so that Ctrl-C does not reach it."""
        self._mark = uuid.uuid4().hex
        # -P: the folder of this file holds modules that have nothing to do with it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, self._mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark the processes that are started inside of the context, and their descendants."""
        before = os.environ.get(MARK)
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[MARK]
            if before is not None:
                os.environ[MARK] = before

    def name(self, processes: Iterable[psutil.Process]) -> None:
        """Name processes that are to end too, whatever their environment."""
        assert self._process.stdin is not None, "it is a pipe"
        for process in processes:
            with suppress(psutil.Error):
                self._process.stdin.write(f"{process.pid} {process.create_time()}\n".encode())
        self._process.stdin.flush()

    def end_leftovers(self) -> None:
        """Let it kill what is left now, and wait for its end."""
        self._process.communicate()


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return the living processes of this user with the mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            living = process.status() != psutil.STATUS_ZOMBIE
            if living and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def named_processes(lines: Iterable[str]) -> list[psutil.Process]:
    """Return the living processes among those of `LeftoverGuard.name`."""
    found = []
    for line in lines:
        pid, created = line.split()
        with suppress(psutil.Error):
            process = psutil.Process(int(pid))
            # Another process may have got the number since.
            same = process.create_time() == float(created)
            if same and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill(mark: str, lines: Sequence[str]) -> None:
    """Kill the processes with the mark and those that were named, until there are none."""
    deadline = time.monotonic() + LIMIT_S
    while processes := [*marked_processes(mark), *named_processes(lines)]:
        if time.monotonic() > deadline:
            return
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(PAUSE_S)


def main() -> None:
    """Wait until the driver closes its end of the pipe, which its own end does too."""
    lines = sys.stdin.read().splitlines()
    kill(sys.argv[1], lines)


if __name__ == "__main__":
    main()
