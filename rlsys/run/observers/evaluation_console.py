"""Console output of an evaluation: progress, and the table of results at the end."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rlsys.data.response_files import ScoredResponses
from rlsys.run.evaluation_directory import EvaluationDirectory
from rlsys.run.evaluation_summary import EvaluationResults
from rlsys.run.observers.console import duration
from rlsys.run.observers.evaluation_text import (
    breakdown_heads,
    breakdown_rows,
    broken_down,
    difference_cells,
    measure_names,
    overlap_line,
    title_of,
    with_interval,
)
from rlsys.run.shown_text import visible

LETTERS = "AB"
LINES = 10  # of progress for each model, where there is no live display


class EvaluationProgress:
    """The progress of one model after the other: live on a terminal, lines elsewhere."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self._console = console
        self._task: TaskID | None = None  # of the live display
        self._display = None
        if live and console.is_terminal:
            self._display = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=console,
                transient=True,
            )

    def start(self, name: str, total: int) -> None:
        """Begin with a model that answers `total` prompts."""
        self._name, self._total = name, total
        self._done = self._kept = self._shown = 0
        self._correct = self._responses = self._tokens = 0
        self._began = time.monotonic()
        if self._display:
            self._display.start()
            self._task = self._display.add_task(name, total=total, note="")

    def keep(self, prompts: int) -> None:
        """Count prompts that an earlier run has sampled."""
        self._done += prompts
        self._kept += prompts
        self._show()

    def add(self, group: ScoredResponses) -> None:
        """Count one prompt."""
        self._done += 1
        self._responses += len(group.rewards)
        self._correct += int(group.rewards.correct.sum())
        self._tokens += group.rollouts.num_response_tokens
        self._show()

    def stop(self) -> None:
        """End the display of a model, if one is shown."""
        if self._display and self._task is not None:
            self._display.stop()
            self._display.remove_task(self._task)
            self._task = None

    def notice(self, text: str) -> None:
        """Print a text for the user at once."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _note(self) -> str:
        """Return the accuracy of the prompts that were sampled now, and the speed."""
        if not self._responses:
            return f"{self._kept} kept from an earlier run"
        seconds = max(time.monotonic() - self._began, 1e-9)
        return (
            f"accuracy {self._correct / self._responses:.1%}, {self._tokens / seconds:.0f} tokens/s"
        )

    def _show(self) -> None:
        if self._display and self._task is not None:
            self._display.update(self._task, completed=self._done, note=self._note())
            return
        tenth = self._done * LINES // max(1, self._total)
        if tenth > self._shown:
            self._shown = tenth
            self.notice(f"{self._name}: {self._done}/{self._total} prompts, {self._note()}")


def print_results(
    console: Console, results: EvaluationResults, directory: EvaluationDirectory, seconds: float
) -> None:
    """Print the tables of an evaluation, and the paths of its files."""
    console.print(title_of(results), highlight=False, soft_wrap=True, markup=False)
    if len(results.models) > 1:  # their names may be long paths
        for letter, model in zip(LETTERS, results.models, strict=False):
            console.print(f"{letter}: {model.name}", highlight=False, soft_wrap=True, markup=False)
    console.print(_main_table(results))
    for column in results.models[0].by if results.models else ():
        console.print(_breakdown_table(results, column))
    if results.overlap is not None:
        _print_overlap(console, results)
    for notice in results.notices:
        console.print(notice, highlight=False, soft_wrap=True, markup=False)
    console.print(f"wall time    {duration(seconds)}", highlight=False)
    written = {
        "report": directory.report,
        "results": directory.results,
        "responses": directory.responses,
        "log": directory.log,
    }
    for label, path in written.items():
        if path.exists():
            console.print(f"{label:<12} {path}", highlight=False, soft_wrap=True, markup=False)


def _main_table(results: EvaluationResults) -> Table:
    table = Table()
    table.add_column("")
    for name in _short_names(results):
        table.add_column(Text(visible(name)), overflow="fold")
    comparison = results.comparison
    if comparison is not None:
        table.add_column("B - A")
        table.add_column("p (sign test)")
    for name in measure_names(results.models):
        cells = [
            with_interval(name, model.estimates[name]) if name in model.estimates else "-"
            for model in results.models
        ]
        if comparison is not None:
            cells += difference_cells(name, comparison.differences)
            cells = [_in_two_lines(cell) for cell in cells]
        table.add_row(Text(name), *map(Text, cells))
    return table


def _short_names(results: EvaluationResults) -> list[str]:
    """Return the heads of the columns: the model's name, or letters for two."""
    if len(results.models) == 1:
        return [results.models[0].name]
    return list(LETTERS[: len(results.models)])


def _in_two_lines(cell: str) -> str:
    """Put the interval or the counts below the number: five columns fit into 80 characters."""
    number, _, counts = cell.partition(" (")
    lines = [number, counts.removesuffix(")")] if counts else [cell.replace(" [", "\n[")]
    return "\n".join(lines)


def _breakdown_table(results: EvaluationResults, column: str) -> Table:
    """Return accuracy, pass@k and majority@k of one model, or the accuracies of two."""
    names = broken_down(results) if len(results.models) == 1 else ["accuracy"]
    table = Table(title=Text(visible(f"by {column}")), title_justify="left")
    table.add_column(Text(visible(column)), overflow="fold")
    table.add_column("prompts", justify="right")
    for head in breakdown_heads(results, names, _short_names(results)):
        table.add_column(Text(visible(head)), overflow="fold")
    for value, prompts, cells in breakdown_rows(results, column, names):
        if results.comparison is not None:
            cells = [_in_two_lines(cell) for cell in cells]
        table.add_row(Text(visible(value)), str(prompts), *map(Text, cells))
    return table


def _print_overlap(console: Console, results: EvaluationResults) -> None:
    assert results.overlap is not None
    console.print(overlap_line(results), highlight=False, soft_wrap=True, markup=False)
    for problem in results.overlap.overlapping[:5]:
        console.print(
            f"  {problem.problem_id}: {problem.fraction:.0%} of its n-grams, as "
            f"{', '.join(problem.train_ids)}: {problem.shared}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    rest = len(results.overlap.overlapping) - 5
    if rest > 0:
        console.print(f"  and {rest} more, in evaluation.json", highlight=False)
