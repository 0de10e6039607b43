"""Before a resume: the newer state of a run, of its directory and its storage, becomes local."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rlsys.config import ConfigError
from rlsys.config.command_line import CONFIG_FILE
from rlsys.run.checkpoints import MANIFEST, PARTIAL, PREFIX, CheckpointStore, find_damage
from rlsys.run.directory import RunDirectory
from rlsys.run.storage import CHECKPOINTS, FIELD, unusable
from rlsys.run.storage_owner import (
    OWNER,
    SILENT_S,
    LocalIdentity,
    Owner,
    read_owner,
    refuse_a_living_owner,
)
from rlsys.run.stored_place import PROBE, StoredPlace, StoreErrors

ROLLOUTS = "rollouts/"


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint in a storage that has all of its files, by their sizes."""

    step: int
    name: str
    files: tuple[str, ...]


def fetch_stored_run(
    place: StoredPlace,
    directory: RunDirectory,
    *,
    dry_run: bool,
    notify: Callable[[str], None],
    silent_s: float = SILENT_S,
) -> bool:
    """Make the local directory hold the newest complete state of the run.

    The state with the newest complete checkpoint wins; of two with the same step, that of the later
    start of the run. Nothing is fetched where the local one wins, or the storage holds no run.

    Args:
        silent_s: see `refuse_a_living_owner`.

    Returns:
        Whether the storage holds the run.

    Raises:
        ConfigError: the storage cannot be read, is written to by a living process, or holds another
            run than the directory; or a dry run would have to fetch.
    """
    try:
        return _fetch(place, directory, dry_run=dry_run, notify=notify, silent_s=silent_s)
    except ConfigError:
        raise
    except StoreErrors as error:
        raise unusable(place, error) from error


def _fetch(
    place: StoredPlace,
    directory: RunDirectory,
    *,
    dry_run: bool,
    notify: Callable[[str], None],
    silent_s: float,
) -> bool:
    if not dry_run:
        refuse_a_living_owner(place, silent_s=silent_s, notify=notify)
    stored = place.sizes()
    owner = read_owner(place)
    if owner is None or CONFIG_FILE not in stored:
        return False
    _refuse_another_run(place, directory, owner)

    found = list(_complete(place, stored))
    newest = found[0].step if found else 0
    if not _is_newer(newest, owner, directory):
        return True
    if dry_run:
        raise ConfigError(
            f"{FIELD}: the newest state of the run (step {newest}) is in {place.shown!r} alone, "
            "and a dry run fetches nothing. Leave out --dry-run."
        )
    notify(f"fetching the run from {place.shown} into {directory.path}")
    _fetch_newest_checkpoint(place, directory, found, notify)
    _delete_other_rollouts(directory, stored)
    _fetch_files(place, directory, stored)
    LocalIdentity(run=owner.run, start=owner.start).write(directory)
    return True


def _refuse_another_run(place: StoredPlace, directory: RunDirectory, owner: Owner) -> None:
    if not directory.config.is_file():
        return
    own = LocalIdentity.read(directory)
    if own is None or own.run != owner.run:
        raise ConfigError(
            f"{FIELD}: {place.shown!r} holds another run than the directory "
            f"{str(directory.path)!r}. Name another place, or another run.directory."
        )


def _is_newer(stored_step: int, owner: Owner, directory: RunDirectory) -> bool:
    """Return whether the stored state of the run is newer than the local one."""
    own = LocalIdentity.read(directory)
    if own is None or not directory.config.is_file():
        return True
    newest = CheckpointStore(directory.checkpoints, keep=1).latest()
    local_step = newest.step if newest else 0
    return (stored_step, owner.start) > (local_step, own.start)


def _complete(place: StoredPlace, stored: dict[str, int]) -> Iterator[StoredCheckpoint]:
    """Yield the complete checkpoints of a storage, the newest first."""
    folders = {name.split("/")[1] for name in stored if name.startswith(f"{CHECKPOINTS}/{PREFIX}")}
    numbered = [name for name in folders if name.removeprefix(PREFIX).isdigit()]
    for name in sorted(numbered, key=lambda name: int(name.removeprefix(PREFIX)), reverse=True):
        base = f"{CHECKPOINTS}/{name}"
        manifest = place.read_json(f"{base}/{MANIFEST}")
        if not isinstance(manifest, dict):
            continue
        if all(stored.get(f"{base}/{file}") == one["bytes"] for file, one in manifest.items()):
            step = int(name.removeprefix(PREFIX))
            yield StoredCheckpoint(step=step, name=name, files=(*manifest, MANIFEST))


def _fetch_newest_checkpoint(
    place: StoredPlace,
    directory: RunDirectory,
    found: list[StoredCheckpoint],
    notify: Callable[[str], None],
) -> None:
    """Fetch the newest checkpoint whose checksums are right.

    Raises:
        ConfigError: none is.
    """
    for checkpoint in found:
        if _fetch_checkpoint(place, directory, checkpoint, notify):
            return
    if found:
        raise ConfigError(
            f"{FIELD}: every checkpoint in {place.shown!r} is damaged. Start a new run in another "
            "place."
        )


def _fetch_checkpoint(
    place: StoredPlace,
    directory: RunDirectory,
    checkpoint: StoredCheckpoint,
    notify: Callable[[str], None],
) -> bool:
    """Fetch one checkpoint; return False, and leave nothing, where it is damaged."""
    final = directory.checkpoints / checkpoint.name
    base = f"{CHECKPOINTS}/{checkpoint.name}"
    if find_damage(final) is None:
        stored = place.read(f"{base}/{MANIFEST}")
        if stored == (final / MANIFEST).read_bytes():
            return True  # from an earlier try

    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    for file in checkpoint.files:
        place.download(f"{base}/{file}", partial / file)
    damage = find_damage(partial)
    if damage is not None:
        notify(f"{place.shown}/{base} is damaged ({damage}): using the one before it")
        shutil.rmtree(partial)
        return False
    shutil.rmtree(final, ignore_errors=True)  # damaged, or of an older start of the run
    os.replace(partial, final)
    return True


def _delete_other_rollouts(directory: RunDirectory, stored: dict[str, int]) -> None:
    """Delete rollouts of steps that a later start of the run took again, or has yet to take.

    They would be stored in the places of the right ones.
    """
    for file in directory.rollouts.glob("step_*.parquet"):
        if stored.get(f"{ROLLOUTS}{file.name}") != file.stat().st_size:
            file.unlink()


def _fetch_files(place: StoredPlace, directory: RunDirectory, stored: dict[str, int]) -> None:
    """Fetch all other files; of the rollouts the first and the last, which the report shows.

    The configuration is the last one: without it a directory holds no run.
    """
    rollouts = sorted(name for name in stored if name.startswith(ROLLOUTS))
    for name in stored:
        if name.startswith((f"{CHECKPOINTS}/", PROBE)) or name.endswith(PARTIAL):
            continue
        if name in (CONFIG_FILE, OWNER) or name in rollouts[1:-1]:
            continue
        place.download(name, directory.path / name)
    place.download(CONFIG_FILE, directory.config)
