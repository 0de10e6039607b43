"""The command of a grid of expert iterations: one process after the other, and a summary.

Each run is a process of its own, so that it starts from a clean Ray, shows its own display, and is
the same as the command of its recipe. Ctrl-C stops the run in progress, which saves, and the grid.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from recipes.expert_iteration_math import expert_iteration_math
from recipes.run_command import exit_with_code_of
from rlsys.config.command_line import Invocation, dump_yaml, flat, load_yaml, parse
from rlsys.config.errors import Mistakes, as_config_error
from rlsys.config.expert_grid import (
    RECIPE_OF_A_CELL,
    Cell,
    ExpertGridConfig,
    cells_of,
    grid_mistakes,
)
from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.run.shown_text import shown

if TYPE_CHECKING:
    from rich.console import Console

    from rlsys.run.directory import RunDirectory

GridRecipe = Callable[[Hardware], ExpertGridConfig]

FAILED = 1
REFUSED = 2
INTERRUPTED = 130


def run_expert_grid(recipe: GridRecipe, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a grid as a command, and exit: 0 done, 2 invalid input, 130 interrupted, 1 failed."""
    hardware = detect_hardware()

    def run() -> int:
        invocation = parse(recipe(hardware), sys.argv[1:] if arguments is None else arguments)
        return _run(invocation, hardware)

    exit_with_code_of(run, continued="a grid")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One combination of the grid, with its configuration and directory."""

    cell: Cell
    config: ExpertIterationRunConfig
    directory: RunDirectory

    @property
    def exists(self) -> bool:
        """Whether the run was started before."""
        return self.directory.config.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether all its steps are done."""
        from rlsys.run.observers.run_status import read_status

        status = read_status(self.directory)
        return (
            status is not None
            and status.state == "finished"
            and status.step >= self.config.trainer.steps
        )

    def command(self, overrides: Path) -> list[str]:
        """Return the command of the run; `overrides` is a file for `--config`."""
        words = [sys.executable, "-m", f"recipes.{RECIPE_OF_A_CELL}", "--config", str(overrides)]
        words += ["--run.directory", str(self.directory.path)]
        return [*words, "--resume"] if self.exists else words

    def overrides(self, hardware: Hardware) -> dict[str, Any]:
        """Return what differs from the recipe, or from the run's own configuration, nested."""
        before = expert_iteration_math(hardware)
        if self.exists:
            before = load_yaml(self.directory.config, ExpertIterationRunConfig)
        old, new = flat(before.model_dump(mode="json")), flat(self.config.model_dump(mode="json"))
        changed = {name: value for name, value in new.items() if old.get(name) != value}
        changed.pop("run.directory", None)
        if self.exists:  # what was chosen for the machine stays
            changed = {name: value for name, value in changed.items() if value != "auto"}
        return _nested(changed)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted names as a tree."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, leaf = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return tree


def _run(invocation: Invocation[ExpertGridConfig], hardware: Hardware) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rlsys.run.directory import RunDirectory
    from rlsys.run.observers.plain_console import PlainConsole

    console, config = PlainConsole(), invocation.config
    directory = RunDirectory.named_by(config)
    with as_config_error():
        runs = _prepare(invocation, directory, hardware)
    if invocation.dry_run:
        print(shown(dump_yaml(config)))
        _describe(runs, console)
        return 0

    if not invocation.resume:
        claimed = directory.claim()
        if claimed != directory:  # another grid of the same second
            directory = claimed
            runs = planned_runs(config, directory)
    directory.write_config(config)
    return run_all(runs, config, directory, hardware, console)


def _prepare(
    invocation: Invocation[ExpertGridConfig], directory: RunDirectory, hardware: Hardware
) -> list[PlannedRun]:
    """Return all runs, after checking each as its own command would.

    Raises:
        ValueError: mistakes, a line each.
    """
    from recipes.run_recipe import check_problems, choose_models
    from rlsys.run.expert_iteration_checks import expert_mistakes

    config = invocation.config
    mistakes = Mistakes()
    mistakes.lines += grid_mistakes(config, invocation.explicit)
    mistakes.attempt("run.directory", lambda: directory.check(resume=invocation.resume))
    mistakes.refuse()

    runs = planned_runs(config, directory)
    for run in runs:
        mistakes.attempt(
            "grid",
            lambda run=run: check_problems(
                run.config,
                run.config.online(),
                hardware,
                resume=run.exists,
                further_mistakes=expert_mistakes(run.config),
            ),
        )
    mistakes.lines = list(dict.fromkeys(mistakes.lines))
    mistakes.refuse()
    choose_models(runs[0].config.online(), hardware)  # the grid does not change what it checks
    return runs


def planned_runs(config: ExpertGridConfig, directory: RunDirectory) -> list[PlannedRun]:
    """Return the runs of a grid, in the order in which they are made."""
    from rlsys.run.directory import RunDirectory

    runs = []
    for cell in cells_of(config.grid):
        path = directory.path / cell.name
        runs.append(
            PlannedRun(
                cell=cell, config=cell.config(config, str(path)), directory=RunDirectory(path)
            )
        )
    return runs


def _describe(runs: Sequence[PlannedRun], console: Console) -> None:
    """Print what a grid would do."""
    for number, run in enumerate(runs, start=1):
        cell = run.cell
        state = "finished already" if run.is_finished else "resumed" if run.exists else "new"
        console.print(
            f"run {number} of {len(runs)}: {cell.label}: {cell.problems * cell.samples} responses "
            f"per step, {run.config.trainer.steps} steps, {state}, {run.directory.path}",
            highlight=False,
            soft_wrap=True,
        )


def run_all(
    runs: Sequence[PlannedRun],
    config: ExpertGridConfig,
    directory: RunDirectory,
    hardware: Hardware,
    console: Console,
) -> int:
    """Make the runs that are not finished, write the summary after each, and print it at the end.

    A run that fails does not end the grid, since another combination may succeed. Invalid input
    does, and so does an interrupt.
    """
    code = 0
    for number, run in enumerate(runs, start=1):
        title = f"run {number} of {len(runs)}: {run.cell.label}"
        if run.is_finished:
            console.print(f"{title}: finished already", highlight=False)
            continue
        console.rule(title)
        ended = run_one(run, directory, hardware)
        _write_summary(runs, config, directory)
        code = max(code, ended)
        if ended in (REFUSED, INTERRUPTED):
            break

    _write_summary(runs, config, directory)
    _print_summary(runs, directory, console)
    if code:
        console.print(
            f"not all runs are finished. Continue with --run.directory {directory.path} --resume",
            highlight=False,
            soft_wrap=True,
        )
    return code


def run_one(run: PlannedRun, directory: RunDirectory, hardware: Hardware) -> int:
    """Start the process of a run, wait for it, and return its exit code; 1 if it was killed.

    It has a session of its own, so that Ctrl-C reaches it once: from here. Once that has happened
    the code is that of an interrupt, also where the run has finished meanwhile.
    """
    overrides = directory.path / f"{run.cell.name}.yaml"
    overrides.write_text(yaml.safe_dump(run.overrides(hardware), sort_keys=False), encoding="utf-8")
    process = subprocess.Popen(run.command(overrides), start_new_session=True)
    forwarded: list[int] = []

    def forward(number: int, frame: object) -> None:
        forwarded.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if forwarded:
        return INTERRUPTED
    return code if code >= 0 else FAILED


def _write_summary(
    runs: Sequence[PlannedRun], config: ExpertGridConfig, directory: RunDirectory
) -> None:
    from rlsys.run.expert_grid_summary import result_of, write_summary
    from rlsys.run.observers.expert_grid_report import write_page

    results = [(run.cell, result_of(run.cell, run.directory)) for run in runs]
    write_summary([result for _, result in results], directory.path)
    write_page(directory.path.resolve().name, config.model.path, results, directory.path)


def _print_summary(runs: Sequence[PlannedRun], directory: RunDirectory, console: Console) -> None:
    from rlsys.run.expert_grid_summary import CSV_FILE, PARQUET_FILE, result_of
    from rlsys.run.observers.expert_grid_report import PAGE, summary_table

    console.print(summary_table([result_of(run.cell, run.directory) for run in runs]))
    for file in (PAGE, CSV_FILE, PARQUET_FILE):
        console.print(f"{directory.path / file}", highlight=False, soft_wrap=True)
