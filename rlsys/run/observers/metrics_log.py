"""metrics.jsonl and TensorBoard events: all metrics of a run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from tensorboardX import SummaryWriter

from rlsys.run.directory import RunDirectory, write_whole
from rlsys.run.observers.observer import Observer, Outcome
from rlsys.run.observers.renamed_metrics import current_name
from rlsys.run.observers.step_notes import step_notes

Kind = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class MetricsRecord:
    """One line of metrics.jsonl."""

    kind: Kind
    step: int
    time: float  # seconds since the epoch
    values: Mapping[str, float]  # NaN where the file has null: not finite
    notes: tuple[str, ...] = ()  # remarks on the step, for the user


def read_metrics(path: Path) -> list[MetricsRecord]:
    """Return all complete records; a last line that a crash cut off is left out.

    Metrics that an earlier version wrote are returned under their present names.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        numbers = {
            current_name(name): math.nan if value is None else value
            for name, value in fields["values"].items()
        }
        records.append(
            MetricsRecord(
                kind=fields["kind"],
                step=fields["step"],
                time=fields["time"],
                values=numbers,
                notes=tuple(fields.get("notes", ())),
            )
        )
    return records


class MetricsLog(Observer):
    """Observer that appends to metrics.jsonl, flushed line by line, and to TensorBoard.

    Nothing is written before the loop starts, so that a refused resume changes no file.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._path = directory.metrics
        self._tensorboard = directory.tensorboard
        self._lines = 0
        self._file: TextIO | None = None
        self._events: SummaryWriter | None = None

    def state(self) -> int:
        """Return the number of lines written so far."""
        return self._lines

    def load_state(self, lines: int) -> None:
        """Continue after the lines that were written before a checkpoint."""
        self._lines = min(lines, len(read_metrics(self._path)))

    def _opened(self) -> tuple[TextIO, SummaryWriter]:
        """Return the files; on first use, open them and drop lines after the checkpoint."""
        if self._file is None or self._events is None:
            self._truncate()
            self._file = self._path.open("a")
            self._events = SummaryWriter(str(self._tensorboard))
        return self._file, self._events

    def _truncate(self) -> None:
        """Drop the lines that a crashed run wrote after its last checkpoint."""
        if not self._path.exists():
            return
        kept = self._path.read_text().splitlines(keepends=True)[: self._lines]
        write_whole(self._path, "".join(kept))

    def _write(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        record = {
            "kind": kind,
            "step": step,
            "time": time.time(),
            "values": {name: finite.get(name) for name in numbers},  # JSON has no NaN: null
        }
        notes = [note.text for note in step_notes(numbers)]
        file, events = self._opened()
        file.write(json.dumps(record | ({"notes": notes} if notes else {}), allow_nan=False) + "\n")
        file.flush()
        self._lines += 1
        for name, value in finite.items():
            events.add_scalar(name, value, step)

    def on_start(self, first_step: int, total_steps: int) -> None:
        self._opened()

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._write("train", step, values)

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self._write("eval", step, values)

    def on_end(self, outcome: Outcome, message: str) -> None:
        for stream in (self._file, self._events):
            if stream is not None:
                stream.close()
