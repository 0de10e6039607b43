"""metrics.jsonl and TensorBoard events: all metrics of a run."""

from __future__ import annotations

import json
import math
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
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


class _Values(Mapping[str, float]):
    """Values whose names are stored once for all records that have the same.

    A report reads all records of a run, and as dicts those of 10,000 steps take 100 MB.
    """

    __slots__ = ("_numbers", "_places")

    def __init__(self, places: Mapping[str, int], numbers: array[float]) -> None:
        """Combine the place of each name with the numbers."""
        self._places = places
        self._numbers = numbers

    def __getitem__(self, name: str) -> float:
        return self._numbers[self._places[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return repr(dict(self))


def read_metrics(path: Path) -> list[MetricsRecord]:
    """Return all complete records; a last line that a crash cut off is left out.

    Metrics that an earlier version wrote are returned under their present names.
    """
    if not path.exists():
        return []
    records = []
    known_places: dict[tuple[str, ...], dict[str, int]] = {}
    with path.open() as lines:
        for line in lines:
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            values = fields["values"]
            names = tuple(values)
            if names not in known_places:
                known_places[names] = {current_name(name): i for i, name in enumerate(names)}
            numbers = array("d", (math.nan if v is None else v for v in values.values()))
            records.append(
                MetricsRecord(
                    kind=fields["kind"],
                    step=fields["step"],
                    time=fields["time"],
                    values=_Values(known_places[names], numbers),
                    notes=tuple(map(sys.intern, fields.get("notes", ()))),
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
