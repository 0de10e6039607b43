"""Memory and CPU time of a running command with all its processes."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import psutil

INTERVAL_S = 1.0  # reading takes milliseconds of each gibibyte


@dataclass(frozen=True, kw_only=True)
class Use:
    """What the processes have used at some time."""

    time: float  # seconds since the epoch
    gib: float  # resident; a page that several processes share counts once
    cpu: float  # seconds so far, of the processes that are alive


@dataclass
class ProcessUse:
    """The use of a process and of all that it started, once a second, from a thread.

    Example: `with ProcessUse(process.pid) as use: process.wait()`
    """

    pid: int
    samples: list[Use] = field(default_factory=list)

    def __enter__(self) -> ProcessUse:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def peak_gib(self, until: float) -> float:
        """Return the largest memory up to a time."""
        return max(sample.gib for sample in self.samples if sample.time <= until)

    def cpu_seconds(self, start: float, end: float) -> float:
        """Return the CPU seconds between two times, interpolated between samples."""
        times = [sample.time for sample in self.samples]
        used = [sample.cpu for sample in self.samples]
        before, after = np.interp([start, end], times, used)
        return float(after - before)

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_S):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.samples.append(use_of(self.pid))


def use_of(pid: int) -> Use:
    """Return what a process and all that it started have used.

    Raises:
        psutil.NoSuchProcess: the process has ended.
    """
    root = psutil.Process(pid)
    now = time.time()
    bytes_used, seconds = 0, 0.0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds += times.user + times.system
            bytes_used += process.memory_full_info().pss
    return Use(time=now, gib=bytes_used / 1024**3, cpu=seconds)
