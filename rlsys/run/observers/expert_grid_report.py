"""The table and the page of a grid of expert iterations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from rlsys.config.expert_grid import Cell
from rlsys.run.directory import RunDirectory, write_whole
from rlsys.run.expert_grid_summary import CellResult
from rlsys.run.observers.charts import COLOURS, Series, line_chart
from rlsys.run.observers.html_report import render_page
from rlsys.run.observers.metrics_log import MetricsRecord, read_metrics
from rlsys.run.observers.run_charts import series_of

PAGE = "summary.html"

Columns = tuple[tuple[str, Callable[[CellResult], str]], ...]  # label, value of a row

COLUMNS: Columns = (
    ("G", lambda row: str(row.samples)),
    ("epochs", lambda row: str(row.epochs)),
    ("D_b", lambda row: str(row.problems)),
    ("state", lambda row: row.state),
    ("steps", lambda row: str(row.steps)),
    ("accuracy", lambda row: _change(row.accuracy_before, row.accuracy_after, "{:.1%}")),
    ("best", lambda row: _number(row.accuracy_best, "{:.1%}")),
    ("correct samples", lambda row: _change(row.reward_first, row.reward_last, "{:.1%}")),
    ("kept", lambda row: _number(row.kept_fraction, "{:.1%}")),
    ("entropy", lambda row: _change(row.entropy_first, row.entropy_last, "{:.3f}")),
    ("updates", lambda row: str(row.updates)),
    ("sampled tokens", lambda row: f"{row.sampled_tokens:,}"),
    ("seconds", lambda row: f"{row.seconds:.0f}"),
)
CONSOLE_COLUMNS: Columns = (
    *COLUMNS[:4],
    ("before", lambda row: _number(row.accuracy_before, "{:.1%}")),
    ("after", lambda row: _number(row.accuracy_after, "{:.1%}")),
    ("kept", lambda row: _number(row.kept_fraction, "{:.1%}")),
    ("entropy", lambda row: _number(row.entropy_last, "{:.3f}")),
    ("seconds", lambda row: f"{row.seconds:.0f}"),
)
# The curves: title, metric, kind of its records, whether it is a fraction.
CURVES = (
    ("Held-out accuracy", "eval/accuracy", "eval", True),
    ("Correct samples", "reward/accuracy", "train", True),
    ("Entropy of all samples (nats per token)", "rollout/entropy", "train", False),
    ("Kept responses", "expert/kept_fraction", "train", True),
    ("Loss of fine-tuning", "policy/loss", "train", False),
)
AXES: tuple[tuple[str, str, Callable[[CellResult], int]], ...] = (
    ("responses per problem (G)", "G {}", lambda row: row.samples),
    ("epochs of fine-tuning", "epochs {}", lambda row: row.epochs),
    ("problems per step (D_b)", "D_b {}", lambda row: row.problems),
)


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"


def _change(first: float, last: float, form: str) -> str:
    return f"{_number(first, form)} -> {_number(last, form)}"


def rows_of(results: Sequence[CellResult]) -> list[list[str]]:
    """Return the table's cells as text."""
    return [[value(result) for _, value in COLUMNS] for result in results]


def summary_table(results: Sequence[CellResult]) -> Table:
    """Return the table for the console, which fits into 80 characters."""
    table = Table(
        title="held-out accuracy before and after, responses kept, entropy of the last step",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for label, _ in CONSOLE_COLUMNS:
        table.add_column(label, justify="left" if label == "state" else "right", no_wrap=True)
    for result in results:
        table.add_row(*(value(result) for _, value in CONSOLE_COLUMNS))
    return table


def write_page(name: str, model: str, runs: Sequence[tuple[Cell, CellResult]], path: Path) -> None:
    """Write the page of the grid into its directory `path`."""
    results = [result for _, result in runs]
    page = render_page(
        "expert_grid_template.html",
        name=name,
        model=model,
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        columns=[label for label, _ in COLUMNS],
        rows=list(zip(rows_of(results), _reports(results, path), strict=True)),
        charts=[chart for chart in (*_effects(results), *_curves(runs)) if chart],
    )
    write_whole(path / PAGE, page)


def _reports(results: Sequence[CellResult], path: Path) -> Iterator[str]:
    """Yield the report of each run, relative to the page; "" where there is none."""
    for result in results:
        report = RunDirectory(Path(result.directory)).report
        yield str(report.relative_to(path)) if report.is_file() else ""


def effect_points(
    results: Sequence[CellResult], value: Callable[[CellResult], int]
) -> list[tuple[int, float]]:
    """Return the final accuracy over one value of the grid, as the mean over the others.

    A value has a point once every run with it has a result, since the means would be over
    different combinations otherwise.
    """
    open_values = {value(row) for row in results if not math.isfinite(row.accuracy_after)}
    points = []
    for x in sorted({value(row) for row in results} - open_values):
        found = [row.accuracy_after for row in results if value(row) == x]
        points.append((x, sum(found) / len(found)))
    return points


def _effects(results: Sequence[CellResult]) -> Iterator[str]:
    """Yield a chart for each value of the grid that has several points."""
    for label, at, value in AXES:
        points = effect_points(results, value)
        if len(points) > 1:
            line = Series("mean over the other values", tuple(points), markers=True, smooth=False)
            yield line_chart(f"Final held-out accuracy over {label}", [line], percent=True, at=at)


def _curves(runs: Sequence[tuple[Cell, CellResult]]) -> Iterator[str]:
    """Yield each curve of all runs; a chart holds as many runs as there are colours."""
    records = [
        (cell, read_metrics(RunDirectory(Path(result.directory)).metrics)) for cell, result in runs
    ]
    for title, metric, kind, percent in CURVES:
        for heading, part in _charts_of(records):
            lines = [series_of(found, cell.label, metric, kind) for cell, found in part]
            yield line_chart(f"{title}{heading}", lines, percent=percent)


def _charts_of(
    runs: Sequence[tuple[Cell, Sequence[MetricsRecord]]],
) -> Iterator[tuple[str, Sequence[tuple[Cell, Sequence[MetricsRecord]]]]]:
    """Divide runs into charts: all in one, or by D_b, or by parts of that."""
    if len(runs) <= COLOURS:
        yield "", runs
        return
    for problems in sorted({cell.problems for cell, _ in runs}):
        same = [run for run in runs if run[0].problems == problems]
        parts = range(0, len(same), COLOURS)
        for number, start in enumerate(parts, start=1):
            part = f", part {number}" if len(parts) > 1 else ""
            yield f", D_b {problems}{part}", same[start : start + COLOURS]
