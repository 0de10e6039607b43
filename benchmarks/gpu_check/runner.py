"""Runs the checks one after the other, each in a child process with a limit of time.

catalogue -> may it run here? -> child process -> CheckResult -> report
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_check.catalogue import Check
from benchmarks.gpu_check.results import CheckResult

ROOT = Path(__file__).resolve().parents[2]
# With less time than this left no further check begins.
SHORTEST = 5.0
# A child that is ended gets so many seconds to end its own children.
GRACE = 10.0
LAST_LINES = 3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The time that the checks may take."""

    seconds: float  # all of them
    seconds_per_check: float | None = None  # None: as in the catalogue


def run_checks(
    checks: Sequence[Check],
    *,
    device: str,
    limits: Limits,
    asked_for: Collection[str] = (),
) -> Iterator[CheckResult]:
    """Run the checks and yield the outcome of each.

    Args:
        device: cpu or cuda.
        asked_for: names of checks that run on a CPU although the catalogue leaves them out there.
    """
    end = time.monotonic() + limits.seconds
    for check in checks:
        reason = why_not(check, device=device, asked_for=check.name in asked_for)
        left = end - time.monotonic()
        if not reason and left < SHORTEST:
            reason = f"no time left of {limits.seconds:.0f} s"
        if reason:
            yield CheckResult(name=check.name, status="skipped", reason=reason)
            continue

        allowed = limits.seconds_per_check or check.seconds
        with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
            yield run_child(check.name, device, Path(folder), min(allowed, left))


def why_not(
    check: Check,
    *,
    device: str,
    asked_for: bool = False,
    installed: Callable[[str], bool] = lambda package: find_spec(package) is not None,
) -> str:
    """Return why a check does not run on this machine; "" if it does."""
    if check.not_implemented:
        return f"not implemented: {check.not_implemented}"
    if check.needs_gpu and device == "cpu" and not asked_for:
        return f"needs a GPU: {check.needs_gpu}"
    missing = [package for package in check.needs if not installed(package)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return ""


def run_child(name: str, device: str, folder: Path, seconds: float) -> CheckResult:
    """Run one check in a child process and return its outcome.

    Args:
        folder: empty, for the check's own files.
        seconds: after which the child is ended.
    """
    result, log = folder / "result.json", folder / "log"
    work = folder / "work"
    work.mkdir()
    command = [sys.executable, "-m", "benchmarks.gpu_check.child"]
    began = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*command, name, device, str(work), str(result)],
            cwd=ROOT,
            env=environment(device, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_session(child)

    taken = time.monotonic() - began
    if code == 0 and result.is_file():
        return CheckResult.of_json(result.read_text())

    how = f"did not end within {seconds:.0f} s" if code is None else ended(code)
    last = last_lines(log)
    reason = f"{how}: {last}" if last else how
    return CheckResult(name=name, status="failed", reason=reason, seconds=taken)


def environment(device: str, present: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Return a child's environment: it sees one GPU, or none."""
    visible = present.get("CUDA_VISIBLE_DEVICES", "0")
    paths = [str(ROOT), *filter(None, [present.get("PYTHONPATH")])]
    return {
        **present,
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else visible.split(",")[0],
        "PYTHONUNBUFFERED": "1",
        # Nothing is fetched: a machine without a network would wait for the time-outs.
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def end_session(child: subprocess.Popen[bytes]) -> None:
    """End what is left of a child's session: the child, and processes that it started."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def ended(code: int) -> str:
    """Return how a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"ended with signal {signal.Signals(-code).name}"


def last_lines(log: Path) -> str:
    """Return the last lines of a child's output on one line."""
    lines = log.read_text(errors="replace").splitlines()
    return " | ".join([line.strip() for line in lines if line.strip()][-LAST_LINES:])[-400:]
