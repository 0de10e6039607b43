"""Checkpoints that are complete or not there: written beside, verified, renamed; the newest undamaged one is found again.

checkpoints/step_000020/
    config.json, model.safetensors, tokenizer ...     Hugging Face layout: `from_pretrained` loads the directory
    optimizer_rank0.pt, policy_state.json             the policy group's
    trainer_state.json                                the driver's: step, data position, metrics position
    manifest.json                                     size and checksum of every file; written last
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
PREFIX = "step_"
PARTIAL = ".partial"
FULL = 64 << 20  # bytes: with fewer free after a failed write, it failed for want of them


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    path: Path
    state: dict[str, Any]  # the driver's


class CheckpointStore:
    """The checkpoints of one run. One process at a time may save."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._damaged: set[Path] = set()  # found by `latest`

    async def save(
        self, step: int, write: Callable[[Path], Awaitable[None]], state: dict[str, Any]
    ) -> Path:
        """Write a checkpoint and drop the oldest beyond `keep`. `write` fills the directory that it is given.

        Whatever happens meanwhile, earlier checkpoints stay as they were, and this one is there completely or not at all.

        Raises:
            Whatever `write` raises, and OSError of a failing disk, or of a full one whatever `write` made of that.
        """
        final = self._directory / f"{PREFIX}{step:06d}"
        partial = final.with_name(final.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            await write(partial)
            (partial / TRAINER_STATE).write_text(json.dumps(state, indent=1))
            await asyncio.to_thread(_seal, partial)
        except Exception as error:
            self._refuse_a_full_disk(partial, error)
            raise
        if final.exists():  # damaged, or `latest` would have led the run past this step
            self._retire(final)
        partial.rename(final)
        _sync_directory(self._directory)
        await asyncio.to_thread(self._prune)
        return final

    def _refuse_a_full_disk(self, partial: Path, cause: Exception) -> None:
        """Say so where the disk is full, since torch's message of that does not, and give its last space back."""
        free = shutil.disk_usage(self._directory).free
        shutil.rmtree(partial, ignore_errors=True)
        if free < FULL:
            raise OSError(
                f"trainer.checkpoints: the disk of {self._directory} is full ({free >> 20} MiB were free), so {partial.stem} was not written. Free some "
                "space, or keep fewer checkpoints with trainer.checkpoints.keep."
            ) from cause

    def _retire(self, checkpoint: Path) -> None:
        """Take a checkpoint out of the list before its files go, so that a half-deleted one is never taken for one."""
        retired = checkpoint.with_name(checkpoint.name + ".retired" + PARTIAL)
        shutil.rmtree(retired, ignore_errors=True)  # left by a process that was killed here
        checkpoint.rename(retired)
        self._damaged.discard(checkpoint)

    def _prune(self) -> None:
        steps = self._steps()
        intact = [path for path in steps if path not in self._damaged]
        for path in {*steps} - {*intact[-self._keep :]}:
            self._retire(path)
        for leftover in self._directory.glob(f"{PREFIX}*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _steps(self) -> list[Path]:
        """Renamed checkpoint directories, oldest first."""
        found = [
            path
            for path in self._directory.glob(f"{PREFIX}*")
            if re.fullmatch(PREFIX + r"\d+", path.name) and path.is_dir()
        ]
        return sorted(found, key=_step_of)

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; damaged ones are named in the log and passed over."""
        for path in reversed(self._steps()):
            damage = find_damage(path)
            if damage is None:
                return Checkpoint(
                    step=_step_of(path),
                    path=path,
                    state=json.loads((path / TRAINER_STATE).read_text()),
                )
            logger.warning("checkpoint %s is damaged (%s): using the one before it", path, damage)
            self._damaged.add(path)
        return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def _checksum(file: Path) -> int:
    """CRC-32: it finds what disks and killed processes do to files, at a gigabyte a second and more."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _seal(directory: Path) -> None:
    """Flush every file to the disk, then write the manifest."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            _sync_directory(path)
            continue
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.relative_to(directory).as_posix()] = {
            "bytes": path.stat().st_size,
            "crc32": _checksum(path),
        }
    with (directory / MANIFEST).open("w") as stream:
        json.dump(files, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return f"no {MANIFEST}: it was never finished"
    except ValueError:
        return f"{MANIFEST} is not readable"
    if not isinstance(files, dict) or TRAINER_STATE not in files:
        return f"{TRAINER_STATE} is not part of it"
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if _checksum(file) != expected["crc32"]:
            return f"{name} has another checksum"
    return None
