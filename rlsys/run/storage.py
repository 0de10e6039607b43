"""`run.storage`: a second place of a run's files, kept up to date while the run trains.

    runs/<name>/  --thread-->  s3://bucket/runs/<name>/  --`fetch_stored_run`-->  runs/<name>/
    (one machine)                                                              (another machine)

A run writes its own directory, as without a storage. A thread compares it with what it has copied,
and copies what is new: small files every few seconds, checkpoints when they are complete. Nothing
queues up, since it always copies the present state. The files of a checkpoint come first and its
manifest last, so that a reader sees it whole or not at all; the metrics come before the manifest,
so that they reach at least as far as the checkpoint. Checkpoints that the run deletes are deleted
in the storage once a newer one is there.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlsys.config import ConfigError, RunSection
from rlsys.config.command_line import CONFIG_FILE
from rlsys.run.checkpoints import MANIFEST, PARTIAL, CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.storage_owner import (
    LOCAL_IDENTITY,
    OWNER,
    LocalIdentity,
    Owner,
    Ownership,
    read_owner,
    refuse_a_living_owner,
)
from rlsys.run.stored_place import PROBE, StoredPlace, StoreErrors, first_line

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
# Files that are never changed once they have their name; others grow or are replaced.
FINAL_FOLDERS = ("rollouts/",)
FIELD = "run.storage"
SHORT_S = 2.0  # an end of a run that is not worth a line
LEAVING_S = 10.0  # for the block that is being written when the user gives up


@dataclass(frozen=True, kw_only=True)
class StoragePace:
    """How often a storage is written to, and how long a failing one is tried; in seconds."""

    interval: float = 5.0  # between two comparisons
    growing_bytes: float = float(1 << 20)  # per second, at most, for a file that grows
    longest_pause: float = 60.0  # between two tries; they grow from 1 s
    tries_at_end: int = 6  # of a failing storage, once the run is over


class StorageLost(Exception):  # noqa: N818  (it names what happened)
    """Another process has taken the storage."""


class GivenUp(Exception):  # noqa: N818  (no error)
    """The user wants to stop at once."""


def check_storage(section: RunSection, directory: RunDirectory, *, resume: bool) -> None:
    """Refuse a storage that cannot be written, or that holds a run although a new one starts.

    A probe is written, read and deleted.

    Raises:
        ConfigError: with the field run.storage.
    """
    if section.storage is None:
        return
    place = StoredPlace.open(section.storage)
    _refuse_overlap(place, directory)
    try:
        place.probe()
        names = [] if resume else [name for name in place.sizes() if not _is_leftover(name)]
        if names == [OWNER]:  # of a run that may have ended before it stored anything
            refuse_a_living_owner(place, notify=logger.info)
    except ConfigError:
        raise
    except StoreErrors as error:
        raise unusable(place, error) from error
    if names not in ([], [OWNER]):
        raise ConfigError(
            f"{FIELD}: {place.shown!r} holds a run or other files already ({min(names)}). Add "
            "--resume to continue the run, or name another place."
        )


def unusable(place: StoredPlace, error: Exception) -> ConfigError:
    """Return the error about a storage that cannot be read or written."""
    return ConfigError(
        f"{FIELD}: {place.shown!r} cannot be used ({first_line(error)}). Check the name, the "
        "network and the credentials in the environment, or leave it out with --run.storage null."
    )


def _is_leftover(name: str) -> bool:
    return name.startswith(PROBE) or name.endswith(PARTIAL)


def _refuse_overlap(place: StoredPlace, directory: RunDirectory) -> None:
    if not place.is_local:
        return
    stored, local = Path(place.path).resolve(), directory.path.resolve()
    RunDirectory(stored, field=FIELD).check_kept()
    if stored == local or stored in local.parents or local in stored.parents:
        raise ConfigError(
            f"{FIELD}: {place.shown!r} and the run's directory {str(directory.path)!r} overlap. "
            "Name a place outside of it."
        )


@dataclass
class _Copied:
    """What the storage holds, as far as this process knows."""

    files: dict[str, tuple[int, int]] = field(default_factory=dict)  # bytes, time of change
    not_before: dict[str, float] = field(default_factory=dict)
    checkpoints: dict[str, bytes] = field(default_factory=dict)  # manifests, by name
    begun: tuple[str, bytes] | None = None  # a checkpoint that is being copied, and
    begun_files: set[str] = field(default_factory=set)  # its files that are complete


class RunStorage:
    """The copy of one run's directory in another place."""

    def __init__(
        self,
        place: StoredPlace,
        directory: RunDirectory,
        checkpoints: CheckpointStore,
        notify: Callable[[str], None],
        *,
        pace: StoragePace | None = None,
    ) -> None:
        """Create a storage that does nothing yet.

        Args:
            notify: prints a line for the user; called from other threads.
        """
        self._place = place
        self._directory = directory
        self._checkpoints = checkpoints
        self._notify = notify
        self._pace = pace or StoragePace()
        self._copied = _Copied()
        self._failure: str | None = None
        self._everything_is_there = False
        self._ending = threading.Event()
        self._giving_up = threading.Event()
        # Not `Thread.join`: an interrupt of it makes Python 3.11 believe that the thread has ended.
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._ownership: Ownership | None = None
        self._files_due = 0.0
        self._prune_due = True
        self.on_loss: Callable[[], object] = lambda: None  # for a run that should end then

    @property
    def shown(self) -> str:
        """What messages call the place."""
        return self._place.shown

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken the storage."""
        return self._ownership is not None and self._ownership.lost_to is not None

    def claim(self) -> None:
        """Take the storage for this process. `fetch_stored_run` has refused another living one.

        Raises:
            ConfigError: it cannot be used, or another run has it.
        """
        own = LocalIdentity.read(self._directory)
        try:
            stored = self._place.sizes()
            before = read_owner(self._place) if CONFIG_FILE in stored else None
            if before is not None and (own is None or own.run != before.run):
                raise ConfigError(
                    f"{FIELD}: {self.shown!r} belongs to another run than the directory "
                    f"{str(self._directory.path)!r}. Name another place."
                )
            refuse_a_living_owner(self._place, silent_s=0.0, notify=logger.info)
            run = own.run if own else os.urandom(16).hex()
            start = max(own.start if own else 0, before.start if before else 0) + 1
            LocalIdentity(run=run, start=start).write(self._directory)
            owner = Owner.of_this_process(run, start)
            self._ownership = Ownership(self._place, owner, self._lost)
            self._read_stored(stored)
        except ConfigError:
            raise
        except StoreErrors as error:
            raise unusable(self._place, error) from error

    def begin(self) -> None:
        """Start to copy, in a thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._copy, name="run storage", daemon=True)
            self._thread.start()

    def discard(self, *, resumed: bool) -> None:
        """Leave the place of a refused run as it was found: empty, but for a resumed run."""
        self._giving_up.set()
        self._ending.set()
        if self._thread is not None:
            self._done.wait()
        self._end_ownership()
        if resumed or self.is_lost:
            return
        try:
            for name in self._place.sizes():
                self._place.delete(name)
        except StoreErrors:
            logger.warning("files were left in %s", self.shown, exc_info=True)

    def finish(self) -> list[str]:
        """Copy what is new, wait for it, and return what is missing in the storage.

        An interrupt (KeyboardInterrupt) ends the wait. Nothing more is copied then.
        """
        self.begin()
        self._ending.set()
        try:
            if not self._done.wait(SHORT_S):
                self._notify(f"storing in {self.shown}: {shortened(self.missing())} ...")
            self._done.wait()
        except KeyboardInterrupt:
            self._giving_up.set()
            self._done.wait(LEAVING_S)
        self._end_ownership()
        return [] if self._everything_is_there else self.missing()

    def missing(self) -> list[str]:
        """Return the names of the files and checkpoints that the storage lacks."""
        files = [name for name, _, state in self._local_files() if not self._has(name, state)]
        checkpoints = [
            f"{CHECKPOINTS}/{path.name}"
            for path in self._checkpoints.intact()
            if self._copied.checkpoints.get(path.name) != _manifest(path)
        ]
        return [*checkpoints, *files]

    def _end_ownership(self) -> None:
        if self._ownership is not None:
            self._ownership.end()

    def _lost(self, owner: Owner) -> None:
        self._notify(
            f"storage {self.shown}: {owner.described()} has continued this run and writes there "
            "now. Nothing more is stored from here, and this run ends after its step."
        )
        self.on_loss()

    # The thread that copies

    def _copy(self) -> None:
        """Copy until the run is over and everything is there."""
        try:
            self._copy_until_the_end()
        finally:
            self._done.set()

    def _copy_until_the_end(self) -> None:
        failures = 0
        while not self._ending.is_set():
            failures = 0 if self._tried(failures, all_now=False) else failures + 1
            self._ending.wait(self._pause(failures) if failures else self._pace.interval)

        for number in range(self._pace.tries_at_end):
            if self._is_over():
                return
            if not self._tried(number, all_now=True):
                self._giving_up.wait(self._pause(number + 1))
            elif not self.missing():  # else run.log has grown meanwhile
                self._everything_is_there = True
                return

    def _tried(self, failures: int, *, all_now: bool) -> bool:
        """Copy what is new; return False where that failed, after so many failures before."""
        try:
            self._copy_what_is_new(all_now=all_now)
        except (GivenUp, StorageLost):
            return self._is_over()
        except StoreErrors as error:
            self._say_failure(error, self._pause(failures + 1))
            return False
        if self._failure is not None:
            self._failure = None
            self._notify(f"storage {self.shown}: works again; all files up to now are there")
        return True

    def _pause(self, failures: int) -> float:
        return min(2.0 ** (failures - 1), self._pace.longest_pause)

    def _is_over(self) -> bool:
        """Return whether the user has given up, or the storage is another process's."""
        return self.is_lost or self._giving_up.is_set()

    def _say_failure(self, error: Exception, pause: float) -> None:
        reason = first_line(error)
        logger.warning(
            "storage %s failed (%s); next try in %.0f s",
            self.shown,
            reason,
            pause,
            exc_info=error if self._failure is None else None,
        )
        if self._failure is None:
            self._notify(
                f"storage {self.shown} failed ({reason}). The run goes on with its files in "
                f"{self._directory.path}; storing them is tried again until the run ends."
            )
        self._failure = reason

    def _copy_what_is_new(self, *, all_now: bool) -> None:
        self._refuse_to_go_on()
        self._copy_files(all_now=all_now)
        while (checkpoint := self._next_checkpoint()) is not None:
            self._copy_checkpoint(checkpoint)
        self._prune()

    def _refuse_to_go_on(self) -> None:
        """Raise where the user has given up, or the storage is another process's."""
        if self._giving_up.is_set():
            raise GivenUp
        if self.is_lost:
            raise StorageLost

    def _copy_files(self, *, all_now: bool) -> None:
        """Copy all new files but checkpoints; a large one that grows not every time."""
        self._files_due = time.monotonic() + self._pace.interval
        for name, path, state in self._local_files():
            now = time.monotonic()
            waits = now < self._copied.not_before.get(name, 0.0) and not all_now
            if waits or self._has(name, state):
                continue
            try:
                self._place.upload(path, name, self._refuse_to_go_on)
            except FileNotFoundError:
                if path.exists():
                    raise
                continue
            self._copied.files[name] = state
            self._copied.not_before[name] = now + state[0] / self._pace.growing_bytes

    def _local_files(self) -> Iterator[tuple[str, Path, tuple[int, int]]]:
        """Yield name, path and state (bytes, time of change) of all files but checkpoints."""
        root = self._directory.path
        for folder, folders, names in os.walk(root):
            if Path(folder) == root and CHECKPOINTS in folders:
                folders.remove(CHECKPOINTS)
            for name in sorted(names):
                path = Path(folder) / name
                if name.endswith(PARTIAL) or name == LOCAL_IDENTITY:
                    continue
                try:
                    found = path.stat()
                except FileNotFoundError:
                    continue
                state = (found.st_size, found.st_mtime_ns)
                yield path.relative_to(root).as_posix(), path, state

    def _has(self, name: str, state: tuple[int, int]) -> bool:
        return self._copied.files.get(name) == state

    def _next_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that the storage lacks."""
        for path in reversed(self._checkpoints.intact()):
            manifest = _manifest(path)
            if manifest is not None and self._copied.checkpoints.get(path.name) != manifest:
                return path
        return None

    def _copy_checkpoint(self, path: Path) -> None:
        with self._checkpoints.held(path) as there:
            manifest = _manifest(path) if there else None
            if manifest is None:
                return  # deleted meanwhile, since newer ones are there
            base, copied = f"{CHECKPOINTS}/{path.name}", self._copied
            if copied.begun != (path.name, manifest):
                self._delete_stored(base)
                copied.begun, copied.begun_files = (path.name, manifest), set()

            for file in json.loads(manifest):
                if file not in copied.begun_files:
                    self._place.upload(path / file, f"{base}/{file}", self._between_blocks)
                    copied.begun_files.add(file)
            self._copy_files(all_now=True)
            self._require_ownership()
            self._place.write(f"{base}/{MANIFEST}", manifest)
            copied.checkpoints[path.name] = manifest
            copied.begun = None
            self._prune_due = True

    def _require_ownership(self) -> None:
        """Raise where another process has the storage, by what the storage itself says."""
        if self._ownership is not None and not self._ownership.renew():
            raise StorageLost

    def _between_blocks(self) -> None:
        """Keep the small files up to date while a large one is being copied."""
        self._refuse_to_go_on()
        if time.monotonic() >= self._files_due:
            self._copy_files(all_now=False)

    def _delete_stored(self, base: str) -> None:
        """Delete a checkpoint in the storage; first the manifest, so that nobody reads half."""
        self._place.delete(f"{base}/{MANIFEST}")
        self._place.delete_folder(base)
        self._copied.checkpoints.pop(base.rpartition("/")[2], None)

    def _prune(self) -> None:
        """Delete stored checkpoints that the run has deleted, if it has stored another one."""
        local = {path.name for path in self._checkpoints.intact()}
        known = set(self._copied.checkpoints)
        if not self._prune_due and known <= local:
            return
        if known & local:
            stored = {name.split("/")[1] for name in self._place.sizes(CHECKPOINTS)}
            if stored - local:
                self._require_ownership()
            for name in sorted(stored - local):
                self._delete_stored(f"{CHECKPOINTS}/{name}")
        self._prune_due = False

    def _read_stored(self, stored: Mapping[str, int]) -> None:
        """Find out what an earlier start of the run has stored; `stored` has the bytes of files."""
        for name, _, state in self._local_files():
            if name.startswith(FINAL_FOLDERS) and stored.get(name) == state[0]:
                self._copied.files[name] = state
        # Others are damaged, or older, and are deleted or replaced.
        for path in self._checkpoints.intact():
            manifest = f"{CHECKPOINTS}/{path.name}/{MANIFEST}"
            content = self._place.read(manifest) if manifest in stored else None
            if content is not None:
                self._copied.checkpoints[path.name] = content


def shortened(names: Sequence[str]) -> str:
    """Return the first of many names."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _manifest(checkpoint: Path) -> bytes | None:
    try:
        return (checkpoint / MANIFEST).read_bytes()
    except OSError:
        return None
