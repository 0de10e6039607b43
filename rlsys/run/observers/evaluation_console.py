"""Console output of an evaluation: progress, and the table of results at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

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
from rlsys.evaluation.intervals import Estimate
from rlsys.evaluation.measures import Difference
from rlsys.run.evaluation_directory import EvaluationDirectory
from rlsys.run.evaluation_summary import EvaluationResults, ModelResults
from rlsys.run.observers.console import duration

LINES = 10  # of progress for each model, where there is no live display
# Measures in tokens, nats or reward units; all others are fractions.
UNITS = ("length", "entropy", "reward")


def is_fraction(name: str) -> bool:
    """Return whether a measure is a fraction, to be shown in percent."""
    return not name.startswith(UNITS)


def number(name: str, value: float, *, signed: bool = False) -> str:
    """Return a value of a measure: 12.5 %, 31.4, 0.482."""
    sign = "+" if signed else ""
    if is_fraction(name):
        return f"{100 * value:{sign}.1f} %"
    return f"{value:{sign}.1f}" if name == "length" else f"{value:{sign}.3f}"


def with_interval(name: str, estimate: Estimate, *, signed: bool = False) -> str:
    """Return an estimate with its interval: 12.5 % [8.1, 18.9]."""
    shown = number(name, estimate.value, signed=signed)
    if estimate.low is None or estimate.high is None:
        return shown
    ends = [number(name, end, signed=signed) for end in (estimate.low, estimate.high)]
    return f"{shown} [{', '.join(end.removesuffix(' %') for end in ends)}]"


def p_value(difference: Difference) -> str:
    """Return the p-value of the sign test, with the prompts behind it."""
    test = difference.test
    p = f"{test.p_value:.3f}" if test.p_value >= 0.001 else f"{test.p_value:.1e}"
    return f"{p} ({test.better} better, {test.worse} worse)"


class EvaluationProgress:
    """The progress of one model after the other: live on a terminal, lines elsewhere."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self._console = console
        self._task: TaskID | None = None  # of the live display
        self._display = None
        if live and console.is_terminal:
            self._display = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
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


def title_of(results: EvaluationResults) -> str:
    """Return what was evaluated, in a line."""
    models = results.models
    answered = " and ".join(dict.fromkeys(f"{m.prompts} of {m.prompts_total}" for m in models))
    samples = models[0].samples_per_prompt
    return (
        f"{results.origin}: {answered} prompts, {samples} "
        f"{'response' if samples == 1 else 'responses'} each, "
        f"{results.confidence:.0%} confidence intervals over prompts"
    )


def _main_table(results: EvaluationResults) -> Table:
    table = Table()
    table.add_column("")
    for model in results.models:
        table.add_column(Text(model.name), overflow="fold")
    comparison = results.comparison
    if comparison is not None:
        table.add_column("difference")
        table.add_column("p (sign test over prompts)")
    for name in measure_names(results.models):
        cells = [
            with_interval(name, model.estimates[name]) if name in model.estimates else "-"
            for model in results.models
        ]
        if comparison is not None:
            cells += _difference_cells(name, comparison.differences)
        table.add_row(Text(name), *map(Text, cells))
    return table


def measure_names(models: Sequence[ModelResults]) -> list[str]:
    """Return the measures that any of the models has, in order."""
    return list(dict.fromkeys(name for model in models for name in model.estimates))


def _difference_cells(name: str, differences: Mapping[str, Difference]) -> list[str]:
    difference = differences.get(name)
    if difference is None:
        return ["-", "-"]
    return [with_interval(name, difference.estimate, signed=True), p_value(difference)]


def broken_down(results: EvaluationResults) -> list[str]:
    """Return the measures that the tables by level and subject show: accuracy, widest pass@k."""
    names = measure_names(results.models)
    widest = [name for name in names if name.startswith("pass@")][-1:]
    votes = [name for name in names if name.startswith("majority@")][-1:]
    return ["accuracy", *widest, *votes]


def breakdown_rows(results: EvaluationResults, column: str) -> Iterator[tuple[str, int, list[str]]]:
    """Yield value, number of prompts and the cells of a row of a breakdown."""
    names = broken_down(results)
    values = dict.fromkeys(value for model in results.models for value in model.by.get(column, {}))
    for value in values:
        cells, prompts = [], 0
        for model in results.models:
            found = model.by.get(column, {}).get(value)
            prompts = max(prompts, found.prompts if found else 0)
            for name in names:
                estimate = found.estimates.get(name) if found else None
                cells.append(with_interval(name, estimate) if estimate else "-")
        if results.comparison is not None:
            cells += _difference_cells(
                "accuracy", results.comparison.by.get(column, {}).get(value, {})
            )
        yield value, prompts, cells


def breakdown_heads(results: EvaluationResults) -> list[str]:
    """Return the heads of the cells of `breakdown_rows`."""
    several = len(results.models) > 1
    heads = [
        f"{name}, {model.name}" if several else name
        for model in results.models
        for name in broken_down(results)
    ]
    return heads + (["difference of accuracy", "p"] if results.comparison is not None else [])


def _breakdown_table(results: EvaluationResults, column: str) -> Table:
    table = Table(title=Text(f"by {column}"), title_justify="left")
    table.add_column(Text(column))
    table.add_column("prompts", justify="right")
    for head in breakdown_heads(results):
        table.add_column(Text(head), overflow="fold")
    for value, prompts, cells in breakdown_rows(results, column):
        table.add_row(Text(value), str(prompts), *map(Text, cells))
    return table


def overlap_line(results: EvaluationResults) -> str:
    """Return how many problems overlap with the training problems."""
    overlap = results.overlap
    assert overlap is not None
    found = overlap.overlapping
    identical = sum(problem.identical for problem in found)
    return (
        f"overlap with data.train: {len(found)} of {overlap.problems} problems share "
        f"{overlap.ngram} consecutive words or signs with one of {overlap.train_problems} training "
        f"problems (shorter ones: their whole text); {identical} are identical"
    )


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
