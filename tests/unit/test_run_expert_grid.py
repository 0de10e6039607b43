"""The processes of a grid: exit codes, what ends it, and what a Ctrl-C does."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from recipes.expert_iteration_grid import expert_iteration_grid
from recipes.run_expert_grid import PlannedRun, planned_runs, run_all, run_one
from rlsys.config.command_line import evolve
from rlsys.config.expert_grid import ExpertGridConfig
from rlsys.config.hardware import Hardware
from rlsys.run.directory import RunDirectory

MACHINE = Hardware(cpus=2, memory_gib=8, gpus=0, gpu_memory_gib=0)


@dataclass(frozen=True, kw_only=True)
class Scripted(PlannedRun):
    """A run whose process is a short Python program."""

    program: str

    def command(self, overrides: Path) -> list[str]:
        assert overrides.is_file()
        return [sys.executable, "-c", self.program]


def scripted(directory: Path, *programs: str) -> tuple[ExpertGridConfig, list[PlannedRun]]:
    """Return a grid with a run for each program."""
    samples = list(range(1, len(programs) + 1))
    changes = {"grid.samples": samples, "grid.epochs": [1], "grid.problems": [4]}
    config = evolve(expert_iteration_grid(MACHINE), changes)
    runs = planned_runs(config, RunDirectory(directory))
    return config, [
        Scripted(cell=run.cell, config=run.config, directory=run.directory, program=program)
        for run, program in zip(runs, programs, strict=True)
    ]


def finish(directory: Path, *programs: str) -> tuple[int, str]:
    """Make all runs; return the exit code and the output."""
    config, runs = scripted(directory, *programs)
    console = Console(record=True, width=240, force_terminal=False)
    code = run_all(runs, config, RunDirectory(directory), MACHINE, console)
    return code, console.export_text()


def leaves(path: Path, code: int) -> str:
    """Return a program that makes a file and exits."""
    return f"import pathlib, sys; pathlib.Path({str(path)!r}).touch(); sys.exit({code})"


@pytest.mark.parametrize(
    ("codes", "made", "expected"),
    [
        ((0, 0, 0), 3, 0),
        ((0, 1, 0), 3, 1),  # another combination may succeed
        ((0, 2, 0), 2, 2),  # invalid input is that of all
        ((130, 0, 0), 1, 130),
    ],
)
def test_what_ends_a_grid(codes: tuple[int, ...], made: int, expected: int, tmp_path: Path):
    marks = [tmp_path / str(number) for number in range(3)]
    programs = [leaves(mark, code) for mark, code in zip(marks, codes, strict=True)]
    (tmp_path / "grid").mkdir()
    code, text = finish(tmp_path / "grid", *programs)
    assert code == expected
    assert [mark.exists() for mark in marks] == [True] * made + [False] * (3 - made)
    assert ("--resume" in text) == (expected != 0)
    assert (tmp_path / "grid" / "summary.csv").is_file()
    assert (tmp_path / "grid" / "summary.html").is_file()


def test_a_killed_run_has_failed(tmp_path: Path):
    _, runs = scripted(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert run_one(runs[0], RunDirectory(tmp_path), MACHINE) == 1


def test_an_interrupt_reaches_the_run_once_and_ends_the_grid(tmp_path: Path):
    """The run saves and exits with 0; the grid ends all the same."""
    ready, count = tmp_path / "ready", tmp_path / "count"
    program = (
        "import pathlib, signal, time\n"
        "seen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        f"pathlib.Path({str(count)!r}).write_text(str(len(seen)))\n"
    )
    before = signal.getsignal(signal.SIGINT)
    (tmp_path / "grid").mkdir()

    def interrupt() -> None:
        while not ready.exists():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    second = tmp_path / "second"
    code, _ = finish(tmp_path / "grid", program, leaves(second, 0))
    thread.join()
    assert code == 130
    assert count.read_text() == "1"
    assert not second.exists()
    assert signal.getsignal(signal.SIGINT) == before
