"""metrics.jsonl and TensorBoard events: every number of a run, as it comes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from tensorboardX import SummaryWriter

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.observer import Outcome
from rlsys.run.observers.step_notes import step_notes

Kind = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class MetricsRecord:
    """One line of metrics.jsonl."""

    kind: Kind
    step: int
    time: float  # seconds since the epoch
    values: Mapping[str, float]  # NaN where the file has null: not finite
    notes: tuple[str, ...] = ()  # what a person should be told of the step


def read_metrics(path: Path) -> list[MetricsRecord]:
    """All complete records; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        numbers = {
            name: math.nan if value is None else value for name, value in fields["values"].items()
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


class MetricsLog:
    """Observer that appends to metrics.jsonl, flushed line by line, and to TensorBoard."""

    def __init__(self, directory: RunDirectory, *, keep_lines: int | None = None) -> None:
        """Nothing is written before the loop starts, so that a refused resume leaves every file as it was.

        `keep_lines`: on a resume, the lines that the checkpoint knew; what a crashed run wrote after them is dropped.
        """
        self._path = directory.metrics
        self._tensorboard = directory.tensorboard
        self._keep_lines = keep_lines
        known = len(read_metrics(self._path))
        self._lines = known if keep_lines is None else min(known, keep_lines)
        self._file: TextIO | None = None
        self._events: SummaryWriter | None = None

    def _opened(self) -> tuple[TextIO, SummaryWriter]:
        """The open files; opened, and the old one cut, on first use."""
        if self._file is None or self._events is None:
            if self._keep_lines is not None:
                self._truncate(self._keep_lines)
            self._file = self._path.open("a")
            self._events = SummaryWriter(str(self._tensorboard))
        return self._file, self._events

    def _truncate(self, lines: int) -> None:
        kept = (
            self._path.read_text().splitlines(keepends=True)[:lines] if self._path.exists() else []
        )
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self._path)

    def position(self) -> int:
        """Lines written so far: what a checkpoint remembers."""
        return self._lines

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

    def on_phase(self, step: int, phase: str) -> None: ...

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._write("train", step, values)

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self._write("eval", step, values)

    def on_checkpoint(self, step: int, path: str) -> None: ...

    def on_end(self, outcome: Outcome, message: str) -> None:
        for stream in (self._file, self._events):
            if stream is not None:
                stream.close()
