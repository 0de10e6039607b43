"""status.json: the present state of a run, or how it ended.

A run that is killed can write nothing more: its file still says "running", but its process is gone.
`read_status` checks that and then returns "died".
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

import psutil

from rlsys.config import ConfigError
from rlsys.run.directory import RunDirectory, write_whole
from rlsys.run.observers.observer import Observer, Outcome
from rlsys.run.process_identity import is_running
from rlsys.run.shown_text import shown

State = Literal["starting", "running", "restarting", "finished", "interrupted", "failed", "died"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The state of a run at one time."""

    state: State
    phase: str = ""  # "update of step 6"
    message: str = ""  # why it failed, or from where it can be continued
    step: int = 0  # complete steps
    steps: int = 0  # steps of the whole run; 0: not known yet
    time: float  # seconds since the epoch, when this was written
    host: str
    process: int
    process_began: float  # distinguishes the process from a later one with the same number

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "interrupted", "failed", "died")


def read_status(directory: RunDirectory) -> RunStatus | None:
    """Return the status of a run, or None where there is none to read.

    It is "died" where the run should be running and its process, on this machine, is gone.
    """
    try:
        status = RunStatus(**json.loads(directory.status.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    elsewhere = status.host != socket.gethostname()
    if status.is_over or elsewhere or is_running(status.process, status.process_began):
        return status
    return replace(
        status,
        state="died",
        message=(
            "its process is gone without a message; run.log may have more. Continue with --resume."
        ),
    )


def refuse_running(directory: RunDirectory) -> None:
    """Refuse to continue a run whose process is still at work on this machine.

    Raises:
        ConfigError: that is so.
    """
    status = read_status(directory)
    if status is None or status.is_over or status.host != socket.gethostname():
        return
    raise ConfigError(
        f"{directory.field}: the run in {str(directory.path)!r} is still at work, in process "
        f"{status.process}. Wait for its end, or stop it first."
    )


class StatusWriter(Observer):
    """Observer that writes status.json, from before the actors start until the end."""

    def __init__(self, directory: RunDirectory, *, held: bool = False) -> None:
        """Write the status of a run that starts.

        With `held`, nothing is written before the loop starts or the start fails, so that a refused
        resume does not change the file.
        """
        self._path = directory.status
        self._status = RunStatus(
            state="starting",
            phase="start of the actors",
            time=time.time(),
            host=socket.gethostname(),
            process=os.getpid(),
            process_began=psutil.Process().create_time(),
        )
        if not held:
            self._write()

    def fail(self, message: str) -> None:
        """Write that the run failed, unless its end was written already."""
        if not self._status.is_over:
            self._change(state="failed", message=shown(message))

    def interrupt(self, message: str) -> None:
        """Write that the run was interrupted, unless its end was written already."""
        if not self._status.is_over:
            self._change(state="interrupted", message=shown(message))

    def _change(self, **fields: object) -> None:
        changed = {"time": time.time(), **fields}
        self._status = replace(self._status, **changed)  # pyright: ignore[reportArgumentType]
        self._write()

    def _write(self) -> None:
        write_whole(self._path, json.dumps(asdict(self._status)))

    def on_start(self, first_step: int, total_steps: int) -> None:
        self._change(state="running", step=first_step - 1, steps=total_steps)

    def on_phase(self, step: int, phase: str) -> None:
        self._change(phase=f"{phase} of step {step}")

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._change(step=step)

    def on_end(self, outcome: Outcome, message: str) -> None:
        self._change(state=outcome, message=shown(message))
