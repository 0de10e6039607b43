"""The results of a grid of expert iterations: a row for each run, as CSV and Parquet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow
import pyarrow.parquet

from rlsys.config.expert_grid import Cell
from rlsys.run.directory import RunDirectory, write_whole
from rlsys.run.observers.metrics_log import MetricsRecord, read_metrics
from rlsys.run.observers.run_status import read_status

CSV_FILE = "summary.csv"
PARQUET_FILE = "summary.parquet"


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What one run has reached; NaN where it was not measured."""

    samples: int  # G
    epochs: int
    problems: int  # D_b
    state: str  # finished, interrupted, failed, died, running; "not started"
    steps: int  # complete ones
    accuracy_before: float  # held out, greedy
    accuracy_after: float
    accuracy_best: float
    reward_first: float  # fraction of correct samples in the first and in the last step
    reward_last: float
    kept_fraction: float  # mean over the steps
    solved_fraction: float
    entropy_first: float  # of all samples, nats per token
    entropy_last: float
    loss_last: float  # of fine-tuning
    updates: int  # optimizer steps
    sampled_tokens: int
    trained_tokens: int
    seconds: float  # of all steps, without start and evaluation
    directory: str


def result_of(cell: Cell, directory: RunDirectory) -> CellResult:
    """Return the result of one run from the files in its directory, which may not exist."""
    status = read_status(directory)
    records = read_metrics(directory.metrics)
    train = [record for record in records if record.kind == "train"]
    accuracies = _all(records, "eval/accuracy")
    return CellResult(
        samples=cell.samples,
        epochs=cell.epochs,
        problems=cell.problems,
        state=status.state if status else "not started",
        steps=train[-1].step if train else 0,
        accuracy_before=_at(accuracies, 0),
        accuracy_after=_at(accuracies, -1),
        accuracy_best=max(accuracies, default=math.nan),
        reward_first=_at(_all(train, "reward/accuracy"), 0),
        reward_last=_at(_all(train, "reward/accuracy"), -1),
        kept_fraction=_mean(_all(train, "expert/kept_fraction")),
        solved_fraction=_mean(_all(train, "expert/solved_fraction")),
        entropy_first=_at(_all(train, "rollout/entropy"), 0),
        entropy_last=_at(_all(train, "rollout/entropy"), -1),
        loss_last=_at(_all(train, "policy/loss"), -1),
        updates=int(sum(_all(train, "policy/updates"))),
        sampled_tokens=int(sum(_all(train, "rollout/tokens"))),
        trained_tokens=int(sum(_all(train, "policy/tokens"))),
        seconds=sum(_all(train, "time/step")),
        directory=str(directory.path),
    )


def _all(records: Sequence[MetricsRecord], name: str) -> list[float]:
    return [record.values[name] for record in records if name in record.values]


def _at(values: Sequence[float], place: int) -> float:
    return values[place] if values else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def write_summary(results: Sequence[CellResult], directory: Path) -> None:
    """Write summary.csv and summary.parquet, a row for each run; NaN is empty in the CSV."""
    rows = [asdict(result) for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(CellResult)])
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    write_whole(directory / CSV_FILE, text.getvalue())

    partial = directory / f"{PARQUET_FILE}.partial"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
    partial.replace(directory / PARQUET_FILE)


def _cell(value: object) -> object:
    return "" if isinstance(value, float) and math.isnan(value) else value
