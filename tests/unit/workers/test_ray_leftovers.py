"""What a killed driver leaves of its own Ray is ended, and nothing else."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from workers.ray_leftovers import MARK, LeftoverGuard, marked_processes, named_processes

# A driver that starts two processes outside of the context, of which it names one, and one inside,
# which starts another one.
DRIVER = """
import subprocess, sys, time
import psutil
from workers.ray_leftovers import LeftoverGuard

SLEEP = "import time; time.sleep(600)"
STARTS = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); "
quiet = {"start_new_session": True, "stderr": subprocess.DEVNULL}
guard = LeftoverGuard()
before, named = (
    subprocess.Popen([sys.executable, "-c", SLEEP], stdout=subprocess.DEVNULL, **quiet)
    for _ in range(2)
)
guard.name([psutil.Process(named.pid)])
with guard.marking():
    daemon = subprocess.Popen(
        [sys.executable, "-c", STARTS + "print(p.pid, flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE, text=True, **quiet,
    )
worker = daemon.stdout.readline().strip()
print(before.pid, named.pid, daemon.pid, worker, guard._process.pid, flush=True)
if sys.argv[1] == "stops":
    sys.stdin.readline()
    guard.end_leftovers()
    print("stopped", flush=True)
time.sleep(600)
"""


@pytest.fixture
def _processes() -> Iterator[list[psutil.Process]]:
    """Collect processes that end with the test."""
    started: list[psutil.Process] = []
    yield started
    for process in started:
        with suppress(psutil.Error):
            process.kill()


def start(mode: str, started: list[psutil.Process]) -> subprocess.Popen[str]:
    """Start a driver, and add it and the five processes that it has started."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    pids = [int(word) for word in driver.stdout.readline().split()]
    started += [psutil.Process(pid) for pid in pids]
    return driver


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def gone(process: psutil.Process) -> bool:
    with suppress(psutil.Error, psutil.TimeoutExpired):
        process.wait(timeout=60)
    return not lives(process)


def test_what_a_killed_driver_leaves_is_ended(_processes: list[psutil.Process]):  # noqa: PT019
    driver = start("killed", _processes)
    before, named, daemon, worker, guard = _processes
    assert all(map(lives, _processes))

    driver.kill()
    driver.wait()
    assert gone(guard)
    assert not any(map(lives, (named, daemon, worker)))
    assert lives(before)


def test_a_driver_that_stops_waits_for_the_end_of_what_is_left(
    _processes: list[psutil.Process],  # noqa: PT019
):
    driver = start("stops", _processes)
    assert driver.stdin is not None
    assert driver.stdout is not None
    before, named, daemon, worker, guard = _processes
    driver.stdin.write("now\n")
    driver.stdin.flush()
    assert driver.stdout.readline() == "stopped\n"

    assert not any(map(lives, (named, daemon, worker, guard)))
    assert lives(before)
    driver.kill()
    driver.wait()


def test_the_mark_is_there_inside_of_the_context_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(MARK, "of an outer driver")
    guard = LeftoverGuard()
    try:
        with guard.marking():
            inner = os.environ[MARK]
            assert inner != "of an outer driver"
        assert os.environ[MARK] == "of an outer driver"
        assert marked_processes(inner) == []
    finally:
        guard.end_leftovers()


def test_another_process_with_the_number_of_a_named_one_is_none_of_them():
    own = psutil.Process()
    lines = [f"{own.pid} {own.create_time()}", f"{own.pid} {own.create_time() - 5}"]
    assert named_processes(lines) == [own]
