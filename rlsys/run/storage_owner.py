"""Which run a storage belongs to, and which process writes there: owner.json.

A process that writes renews the file every few seconds. Another one that wants to continue the run
watches whether it is renewed, so that clocks need not agree. A process that finds another one in
the file has lost the storage, and writes no more.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil

from rlsys.config import ConfigError
from rlsys.run.directory import RunDirectory, write_whole
from rlsys.run.process_identity import is_running
from rlsys.run.stored_place import StoredPlace, StoreErrors

OWNER = "owner.json"
RENEWED_EVERY_S = 10.0
SILENT_S = 25.0  # a process that has not renewed the file for so long is taken to be gone


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The content of owner.json."""

    run: str  # of all starts of one run
    start: int  # counts the starts of the run, on any machine
    process: str  # of this start alone
    host: str
    number: int  # of the process
    began: float  # distinguishes the process from a later one with the same number
    machine: str  # distinguishes machines, and containers with process numbers of their own
    renewed: int = 0  # counts
    ended: bool = False

    @classmethod
    def of_this_process(cls, run: str, start: int) -> Self:
        """Return the owner that a start of a run by this process is."""
        return cls(
            run=run,
            start=start,
            process=uuid.uuid4().hex,
            host=socket.gethostname(),
            number=os.getpid(),
            began=psutil.Process().create_time(),
            machine=_this_machine(),
        )

    def described(self) -> str:
        """Return who it is, for messages."""
        return f"process {self.number} on {self.host}"


def _this_machine() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def read_owner(place: StoredPlace) -> Owner | None:
    """Return the owner of a storage, or None where it has none."""
    content = place.read_json(OWNER)
    try:
        return Owner(**content)
    except TypeError:
        return None


def refuse_a_living_owner(
    place: StoredPlace, *, silent_s: float = SILENT_S, notify: Callable[[str], None]
) -> None:
    """Refuse a storage to which another process writes at present.

    Where the process was of another machine and did not end properly, this waits for `silent_s`
    seconds for a sign of it.

    Raises:
        ConfigError: it is alive.
    """
    owner = read_owner(place)
    if owner is None or owner.ended:
        return
    if owner.machine == _this_machine():
        if not is_running(owner.number, owner.began):
            return
    else:
        notify(
            f"storage {place.shown}: waiting {silent_s:.0f} s for a sign of {owner.described()}, "
            "which wrote there and did not end properly"
        )
        if not _is_renewed(place, owner, silent_s):
            return
    raise ConfigError(
        f"run.storage: {place.shown!r} is being written to by {owner.described()}. Stop that run "
        "first, or name another place."
    )


def _is_renewed(place: StoredPlace, owner: Owner, limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        time.sleep(min(1.0, limit_s / 10))
        if read_owner(place) != owner:
            return True
    return False


class Ownership:
    """The right of this process to write to a storage, renewed by a thread."""

    def __init__(self, place: StoredPlace, owner: Owner, on_loss: Callable[[Owner], None]) -> None:
        """Take the storage, whoever has it."""
        self._place = place
        self._on_loss = on_loss
        self._end = threading.Event()
        self.owner = owner
        self.lost_to: Owner | None = None
        place.write_json(OWNER, asdict(owner))
        self._thread = threading.Thread(target=self._renew, name="storage owner", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._end.wait(RENEWED_EVERY_S) and self.lost_to is None:
            with suppress(*StoreErrors):  # what copies the files reports that
                self.renew()

    def renew(self, *, ended: bool = False) -> bool:
        """Renew the file; return False where another process has the storage."""
        found = read_owner(self._place)
        if found is not None and found.process != self.owner.process:
            if self.lost_to is None:
                self.lost_to = found
                self._on_loss(found)
            return False
        self.owner = replace(self.owner, renewed=self.owner.renewed + 1, ended=ended)
        self._place.write_json(OWNER, asdict(self.owner))
        return True

    def end(self) -> None:
        """Say that this process writes no more. An error of the store is not raised."""
        self._end.set()
        self._thread.join()
        if self.lost_to is None:
            with suppress(*StoreErrors):
                self.renew(ended=True)


@dataclass(frozen=True, kw_only=True)
class LocalIdentity:
    """Which run a local directory holds, and up to which start; in storage.json."""

    run: str
    start: int

    @staticmethod
    def file(directory: RunDirectory) -> Path:
        return directory.path / LOCAL_IDENTITY

    @classmethod
    def read(cls, directory: RunDirectory) -> Self | None:
        """Return that of a directory, or None where it has none."""
        try:
            content: Any = json.loads(cls.file(directory).read_text(encoding="utf-8"))
            return cls(**content)
        except (OSError, ValueError, TypeError):
            return None

    def write(self, directory: RunDirectory) -> None:
        write_whole(self.file(directory), json.dumps(asdict(self)))


LOCAL_IDENTITY = "storage.json"
