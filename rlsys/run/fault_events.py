"""faults.jsonl: the deaths of processes that a run survived or ended with.

The file is only appended to, also by a resumed run, so it holds every event of the run.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.observer import Observer

# What is counted, each as faults/<kind>, with what the kind means.
FAULT_KINDS: Mapping[str, str] = {
    "generation_worker": "deaths of generation workers",
    "reward_worker": "deaths of reward workers",
    "reward_process": "deaths of processes that compute rewards, while they were working",
    "advantage_controller": "deaths of the advantage controller",
    "response_filter": "deaths of the worker that chooses responses in expert iteration",
    "training_group": "deaths of ranks and nodes, after which all actors are restarted",
    "out_of_memory": "failures for lack of memory, after which all actors are restarted",
    "phase_timeout": "phases that hung, after which all actors are restarted",
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The death of a process or group, and what was done about it."""

    kind: str  # one of `FAULT_KINDS`
    event: str  # such as "generation worker 1 died"
    reason: str  # in one line
    action: str  # what is done about it
    evidence: str = ""  # the end of its stderr and the like
    step: int = 0  # that was in progress
    phase: str = ""
    time: float = field(default_factory=time.time)  # seconds since the epoch

    def line(self) -> str:
        """Return the event in one line, for the console."""
        place = f" in {self.phase} of step {self.step}" if self.phase else ""
        return f"fault{place}: {self.event} ({self.reason}); {self.action}"


def read_faults(path: Path) -> list[Fault]:
    """Return all complete records of a file, which may not exist."""
    if not path.exists():
        return []
    known = {one.name for one in fields(Fault)}
    faults = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a crash cut it off
        faults.append(Fault(**{name: record[name] for name in known & record.keys()}))
    return faults


def count_faults(path: Path) -> dict[str, int]:
    """Return the number of events in a file, by kind."""
    return dict(Counter(fault.kind for fault in read_faults(path)))


class FaultFile(Observer):
    """Observer that appends each event to faults.jsonl; there is no file without one."""

    def __init__(self, directory: RunDirectory) -> None:
        self._path = directory.faults

    def on_fault(self, fault: Fault) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(fault)) + "\n")
