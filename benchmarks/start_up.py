"""CPU seconds from the command of a run to its first step, by process.

    python -m benchmarks.start_up
    python -m benchmarks.start_up --model.path tiny --generation.engine transformers

Flags are those of `recipes.grpo_math`. Evaluation is off, so that the first step follows the start
at once. CPU seconds hardly depend on other work on the same cores; the wall time does. Results are
recorded in docs/measurements_log.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.run_status import read_status

EVERY_S = 0.1  # between two looks at the processes
ONE_STEP = (
    *("--trainer.steps", "1", "--trainer.evaluation.every", "0"),
    *("--trainer.checkpoints.every", "0"),
)


def main(flags: Sequence[str]) -> None:
    """Start a run of one step, and print the CPU seconds that each process took before it."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        command = [sys.executable, "-m", "recipes.grpo_math", *flags, *ONE_STEP]
        began = time.monotonic()
        run = subprocess.Popen(
            [*command, "--run.directory", str(directory)],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        seconds: dict[int, tuple[str, float]] = {}
        while run.poll() is None and not _in_first_step(directory):
            seconds.update(_cpu_seconds(run.pid))
            time.sleep(EVERY_S)
        wall = time.monotonic() - began
        if run.wait() != 0:
            raise SystemExit(f"the run ended with exit code {run.returncode}")
    _show(seconds, wall)


def _in_first_step(directory: Path) -> bool:
    status = read_status(RunDirectory(directory))
    return status is not None and status.phase.endswith("of step 1")


def _cpu_seconds(leader: int) -> dict[int, tuple[str, float]]:
    """Return name and CPU seconds of each process that a run has started, by its id.

    Processes that have ended are not included, so an earlier result for them stays.
    """
    found = {}
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == leader:
                times = process.cpu_times()
                found[process.pid] = (_name(process, leader), times.user + times.system)
    return found


def _name(process: psutil.Process, leader: int) -> str:
    """Return the name of an actor's class, of a Python script or module, or of a program."""
    if process.pid == leader:
        return "driver"
    words = process.cmdline()
    if words and words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").partition(".")[0]
    if "-m" in words:
        return words[words.index("-m") + 1]
    scripts = [Path(word).name for word in words if word.endswith(".py")]
    return scripts[-1] if scripts else process.name()


def _show(seconds: dict[int, tuple[str, float]], wall: float) -> None:
    """Print a table, the largest first."""
    totals: dict[str, list[float]] = defaultdict(list)
    for name, used in seconds.values():
        totals[name].append(used)
    print("| process | number | CPU s |\n|---|---|---|")
    for name, used in sorted(totals.items(), key=lambda item: -sum(item[1])):
        print(f"| {name} | {len(used)} | {sum(used):.1f} |")
    everything = sum(used for _, used in seconds.values())
    print(f"| together | {len(seconds)} | {everything:.1f} |")
    print(f"{wall:.1f} s from the command to the first step")


if __name__ == "__main__":
    main(sys.argv[1:])
