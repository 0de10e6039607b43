"""Stacks of other processes, with and without the permission to read them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from workers import stack_dumps

WAITS = "import time\ndef waiting_here(): print('up', flush=True); time.sleep(600)\nwaiting_here()"
ANSWERS = "import faulthandler, signal\nfaulthandler.register(signal.SIGUSR2, all_threads=True)\n"


@contextmanager
def process(code: str, path: Path) -> Iterator[int]:
    """Run Python code that prints a line when it is ready."""
    with (path / "stderr").open("w") as stderr:
        started = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == "up\n"
        yield started.pid
    finally:
        started.kill()
        started.communicate()


@pytest.fixture
def without_ptrace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer as py-spy does where it may not read other processes."""
    monkeypatch.setattr(stack_dumps, "_by_py_spy", lambda process: "")


def test_py_spy_reads_a_process_that_is_stopped(tmp_path: Path):
    with process(WAITS, tmp_path) as pid:
        psutil.Process(pid).suspend()
        text = stack_dumps._stacks_of([pid])[pid]
        if "no stacks" in text:
            pytest.skip("ptrace is not permitted here")
        assert "waiting_here" in text


@pytest.mark.usefixtures("without_ptrace")
def test_a_process_writes_its_own_stacks_where_ptrace_is_not_permitted(tmp_path: Path):
    with process(ANSWERS + WAITS, tmp_path) as pid:
        assert "waiting_here" in stack_dumps._stacks_of([pid])[pid]


@pytest.mark.usefixtures("without_ptrace")
def test_a_process_that_does_not_handle_the_signal_is_not_ended_by_it(tmp_path: Path):
    with process(WAITS, tmp_path) as pid:
        assert "does not write its own" in stack_dumps._stacks_of([pid])[pid]
        assert psutil.pid_exists(pid)
        assert not stack_dumps._handles_signal(pid)


def test_a_stopped_process_and_its_children_are_killed(tmp_path: Path):
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('up', flush=True)\nchild.wait()"
    )
    with process(code, tmp_path) as pid:
        parent = psutil.Process(pid)
        (child,) = parent.children()
        parent.send_signal(signal.SIGSTOP)
        stack_dumps._kill([pid])
        psutil.wait_procs([child], timeout=20)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        assert parent.status() == psutil.STATUS_ZOMBIE or not parent.is_running()
        assert "gone" in stack_dumps._stacks_of([10**9])[10**9]
