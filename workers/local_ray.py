"""Ray on this machine, started and stopped by one process.

Schedulers and service managers send SIGTERM to every process of a job at once. The run then ends after its step, which needs Ray; so all that Ray starts
has that signal blocked, as Ray itself blocks SIGINT. Stopping is then left to this process: Ray's daemons do not hear its SIGTERM either, and get
SIGKILL a second later, one after the other, without a chance to stop their own workers.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import psutil
import ray
import ray._private.utils

STOPPED_BY_RAY = ("raylet", "gcs_server")  # which a driver needs until it has left
PR_SET_CHILD_SUBREAPER = 36


class LocalRay:
    """`stop` may be called at any time, also where `start` was interrupted."""

    def __init__(self) -> None:
        self._daemons: set[psutil.Process] = set()

    def start(self, **settings: Any) -> None:
        """`ray.init(address="local", **settings)`. A SIGTERM that came meanwhile is delivered at its end."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ctypes.CDLL(None).prctl(
            PR_SET_CHILD_SUBREAPER, 1
        )  # workers whose raylet is gone become children of this process
        others = set(psutil.Process().children())
        with _sigterm_held_back():
            ray.init(address="local", include_dashboard=False, **settings)
            self._daemons = set(psutil.Process().children()) - others

    def stop(self) -> None:
        """Leave Ray and stop every process of it, those that were still starting too."""
        for daemon in self._daemons:
            with suppress(psutil.Error):
                if daemon.name() not in STOPPED_BY_RAY:
                    daemon.kill()
        own = set(psutil.Process().children())
        ray.shutdown()
        for orphan in set(psutil.Process().children()) - own:
            for process in (*orphan.children(recursive=True), orphan):
                with suppress(psutil.Error):
                    process.kill()
            orphan.wait()


def interrupt_on_sigterm() -> None:
    """SIGTERM as Ctrl-C from here on: the handler that `ray.init` leaves aborts the process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def _sigterm_held_back() -> Iterator[None]:
    """Deliver SIGTERM at the end, as Ctrl-C; processes started within never get it.

    It is blocked in this thread, and so in all threads and processes that are started within. A
    thread of an earlier time (OpenBLAS has one until the first fork) may still take it. Then it is
    noted, for which Ray must not put a handler in place that exits.
    """
    noted: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with mock.patch.object(ray._private.utils, "set_sigterm_handler"):
            yield
    finally:
        interrupt_on_sigterm()  # first: the handler of Ray's core aborts the process
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if noted:
        raise KeyboardInterrupt
