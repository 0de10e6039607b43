"""Ray on this machine, started and stopped by one process.

Schedulers and service managers send SIGTERM to every process of a job at once. The run then
finishes its step, which needs Ray. So SIGTERM is blocked in all processes that Ray starts, as Ray
itself blocks SIGINT.

Therefore this process must also stop them. Ray would send SIGTERM to its daemons, which they do not
receive, and SIGKILL a second later, one daemon after the other; the daemons could not stop their
own workers. Where this process is killed, `workers.ray_leftovers` stops them.

Nobody else can use this Ray: all that it opens for the run listens on the loopback address, it asks
for a token, and its token and its folder are for their owner alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import ray
import ray._private.node
import ray._private.ray_constants
import ray._private.services
import ray._private.utils
import ray._private.worker
from ray._private.authentication.authentication_token_generator import (
    generate_new_authentication_token,
)

from workers.ray_leftovers import LeftoverGuard

logger = logging.getLogger(__name__)

# Daemons that the driver needs until it has left; `ray.shutdown` stops them.
STOPPED_BY_RAY = ("raylet", "gcs_server")
# By default Ray starts a process per core that waits for work, and `ray.init` waits for them.
# Actors with environment variables, such as those of a run, cannot use them.
PRESTARTED = ("RAY_enable_worker_prestart", "RAY_prestart_worker_first_driver")
# By default every call of an actor's method is reported to the head process, which keeps 100,000 of
# them, 400 MB, for a dashboard that is not there.
CALLS_ARE_NOT_RECORDED = {"task_events_report_interval_ms": 0}
# A constant of Linux, from <linux/prctl.h>.
PR_SET_CHILD_SUBREAPER = 36


@contextmanager
def needed_processes_only() -> Iterator[None]:
    """Leave out processes of a Ray started inside of the context that no run on one machine needs.

    Each imports Ray for a second of CPU time, and `ray.init` waits for most of them: the monitor
    (it asks an autoscaler for nodes), the log monitor (the logs are not sent to the driver), the
    server of the dashboard (there is no dashboard), and workers for tasks.
    """
    for name in PRESTARTED:
        os.environ.setdefault(name, "0")

    def start_nothing(_: ray._private.node.Node) -> None: ...

    # What `ray.init` has no arguments for. No address and no process: what Ray itself continues
    # with where the server of the dashboard does not start.
    without_server = mock.patch.object(
        ray._private.services, "start_api_server", return_value=("", None)
    )
    without_monitors = mock.patch.multiple(
        ray._private.node.Node, start_monitor=start_nothing, start_log_monitor=start_nothing
    )
    with without_server, without_monitors:
        yield


class LocalRay:
    """A Ray instance of this process; `stop` may be called even if `start` was interrupted."""

    def __init__(self) -> None:
        self._daemons: set[psutil.Process] = set()
        self._guard: LeftoverGuard | None = None

    @needed_processes_only()
    def start(self, **settings: Any) -> None:
        """Start Ray with `ray.init(address="local", **settings)`.

        Raises:
            KeyboardInterrupt: a SIGTERM came meanwhile.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers whose raylet is gone become children of this process, so that `stop` finds them.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)

        protect_token()
        with _sigterm_held_back(), _on_loopback():
            self._guard = LeftoverGuard()
            earlier = set(psutil.Process().children())
            with self._guard.marking():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    _system_config=CALLS_ARE_NOT_RECORDED,
                    **settings,
                )
            _close_session_folder()
            self._daemons = set(psutil.Process().children()) - earlier
            for daemon in self._daemons:
                with suppress(psutil.Error):
                    self._guard.name(daemon.children(recursive=True))

    def stop(self) -> None:
        """Leave Ray and stop all its processes, also those that were still starting."""
        for daemon in self._daemons:
            with suppress(psutil.Error):
                if daemon.name() not in STOPPED_BY_RAY:
                    daemon.kill()

        # The processes that Ray leaves behind become children of this process.
        children = set(psutil.Process().children())
        ray.shutdown()
        for orphan in set(psutil.Process().children()) - children:
            for process in (*orphan.children(recursive=True), orphan):
                with suppress(psutil.Error):
                    process.kill()
            orphan.wait()

        if self._guard is not None:
            self._guard.end_leftovers()
            self._guard = None


def interrupt_on_sigterm() -> None:
    """Handle SIGTERM like Ctrl-C from now on."""
    # The handler that `ray.init` installs aborts the process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def protect_token() -> None:
    """Let Ray ask for a token that no other user of this machine can read.

    Ray reads it from RAY_AUTH_TOKEN, from the file RAY_AUTH_TOKEN_PATH, or from ~/.ray/auth_token.
    It would make the last one readable for everybody. RAY_AUTH_MODE=disabled is respected.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        logger.warning("RAY_AUTH_MODE is not token: whoever reaches this Ray's ports can run code")
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return

    file = Path.home() / ".ray" / "auth_token"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _write_token(file)
        file.chmod(0o600)
    except OSError as error:
        logger.info("ray: a token for this run only, since %s (%s)", file, error.strerror)
        os.environ["RAY_AUTH_TOKEN"] = generate_new_authentication_token()


def refuses_token(error: BaseException) -> bool:
    """Return whether `ray.init` failed because the cluster does not accept this process's token.

    Ray's own error has no word of it; one of those that led to it has.
    """
    cause: BaseException | None = error
    while cause is not None:
        if "InvalidAuthToken" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _write_token(file: Path) -> None:
    """Write a new token; of several processes one does, and none reads half of it."""
    with tempfile.TemporaryDirectory(prefix=".rlsys-", dir=file.parent) as folder:
        own = Path(folder) / file.name
        descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(generate_new_authentication_token())
        with suppress(FileExistsError):
            os.link(own, file)


def _close_session_folder() -> None:
    """Keep other users out of the folder with Ray's sockets, logs and run-time packages.

    Ray lets everybody write there.
    """
    node = ray._private.worker._global_node
    assert node is not None, "Ray has started"
    Path(node.get_session_dir_path()).chmod(0o700)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make a Ray that is started inside the context listen on the loopback address.

    Ray itself does so on macOS and Windows. Elsewhere it takes the address of the machine, also
    where `ray.init` is given the one of the loopback.
    """
    constants = ray._private.ray_constants
    variable = constants.ENABLE_RAY_CLUSTERS_ENV_VAR  # for the processes that Ray starts
    before = os.environ.get(variable)
    os.environ[variable] = "0"
    try:
        with mock.patch.object(constants, "ENABLE_RAY_CLUSTER", False):
            yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


@contextmanager
def _sigterm_held_back() -> Iterator[None]:
    """Delay SIGTERM to the end of the context, where it is handled like Ctrl-C.

    It is blocked in this thread, and so in all threads and processes that are started inside the
    context; the processes never receive it. An older thread of this process (OpenBLAS has one until
    the first fork) may still receive it. Then our handler notes it, and Ray must not replace that
    handler by one that exits.
    """
    noted: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with mock.patch.object(ray._private.utils, "set_sigterm_handler"):
            yield
    finally:
        # Before the signal is unblocked, since the handler of Ray's core aborts the process.
        interrupt_on_sigterm()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if noted:
        raise KeyboardInterrupt
