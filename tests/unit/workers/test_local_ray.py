"""Stopping Ray ends the processes that this process started for it, and no others."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest
import ray

from workers import local_ray
from workers.local_ray import PR_SET_CHILD_SUBREAPER, LocalRay

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# Starts a process, writes its id, and ends: the process goes to another parent, as daemons do.
DETACH = (
    "import subprocess, sys; "
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    "start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
    "print(p.pid)"
)


def detached() -> psutil.Process:
    """Return a process that is no descendant of this one, like the Ray of another user."""
    done = subprocess.run([sys.executable, "-c", DETACH], capture_output=True, text=True)
    return psutil.Process(int(done.stdout))


@pytest.fixture(autouse=True)
def _orphans_go_elsewhere() -> Iterator[None]:
    """Let orphans go to their system's parent until Ray is started, also after earlier tests."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 0)
    yield
    prctl(PR_SET_CHILD_SUBREAPER, 0)


@pytest.fixture
def _started() -> Iterator[list[psutil.Process | subprocess.Popen]]:
    """Collect processes that end with the test."""
    processes: list[psutil.Process | subprocess.Popen] = []
    yield processes
    for process in processes:
        if isinstance(process, subprocess.Popen):
            process.kill()
            process.wait()
        elif process.is_running():
            process.kill()


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_only_own_daemons_and_what_they_leave_behind_are_stopped(
    _started: list[psutil.Process | subprocess.Popen],  # noqa: PT019  (its list is needed)
    monkeypatch: pytest.MonkeyPatch,
):
    stranger = detached()  # before this process adopts orphans
    _started.append(stranger)
    child = subprocess.Popen(SLEEP)  # of this process, before it started Ray
    _started.append(child)
    daemons: list[subprocess.Popen] = []
    orphans: list[psutil.Process] = []

    def start(**settings: object) -> None:
        daemons.append(subprocess.Popen(SLEEP))

    def leave() -> None:
        orphans.append(detached())  # a worker whose raylet is gone: adopted by this process

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", leave)
    monkeypatch.setattr(local_ray, "_close_session_folder", lambda: None)  # there is no Ray
    local = LocalRay()
    _restoring_signals(local.start)
    _started += [*daemons]
    local.stop()
    _started += [*orphans]

    assert daemons[0].wait(timeout=10) != 0
    assert not lives(orphans[0])
    assert lives(stranger)
    assert child.poll() is None
    assert stranger.ppid() != os.getpid()


def _restoring_signals(start: Callable[[], None]) -> None:
    """Start Ray, which replaces the handler of SIGTERM, and put the earlier one back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        start()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_ray_that_was_not_started_is_not_stopped(
    _started: list[psutil.Process | subprocess.Popen],  # noqa: PT019  (its list is needed)
    monkeypatch: pytest.MonkeyPatch,
):
    stranger, child = detached(), subprocess.Popen(SLEEP)
    _started += [stranger, child]
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    LocalRay().stop()
    assert lives(stranger)
    assert child.poll() is None
