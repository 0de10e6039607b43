"""The memory of a running command with all its processes."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field

import psutil

INTERVAL_S = 1.0  # reading takes milliseconds of each gibibyte


@dataclass
class MemorySamples:
    """The memory of a process and of all that it started, once a second, in a thread.

    A page that several processes share counts once (proportional set size).

    Example: `with MemorySamples(process.pid) as memory: process.wait()`
    """

    pid: int
    samples: list[tuple[float, float]] = field(default_factory=list)  # seconds, GiB

    def __enter__(self) -> MemorySamples:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def peak(self, until: float) -> float:
        """Return the largest value up to a time, in GiB."""
        return max(gib for seconds, gib in self.samples if seconds <= until)

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_S):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.samples.append((time.time(), tree_gib(self.pid)))


def tree_gib(pid: int) -> float:
    """Return the memory of a process and of all that it started, in GiB.

    Raises:
        psutil.NoSuchProcess: the process has ended.
    """
    root = psutil.Process(pid)
    total = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 1024**3
