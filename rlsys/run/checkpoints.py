"""Atomic checkpoints: each is complete or absent, and a resume finds the newest undamaged one.

A checkpoint is written to a directory beside its final name. The directory gets a manifest with
checksums, is flushed to the disk, and is renamed last.

    checkpoints/step_000020/
        config.json, model*.safetensors, tokenizer   Hugging Face format, for `from_pretrained`
            (adapter_model.safetensors, in PEFT's format, where adapters are trained)
        optimizer-*.shard, optimizer_shards.json     moments of the policy's optimizer, by ranks
        policy_state.json                            the rest of the policy's state
        critic/                                      the same of the critic, where there is one
        trainer_state.json                           state of the driver: step, data position, ...
        manifest.json                                size and checksum of every file; written last
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
PREFIX = "step_"
PARTIAL = ".partial"
FULL_BELOW = 64 << 20  # bytes; with less free space, a failed write is blamed on a full disk


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
        self._damaged: set[Path] = set()  # filled by `latest`
        self._held: Path | None = None
        self._lock = threading.Lock()  # of `_held`, and of what `_prune` deletes

    async def save(
        self, step: int, write: Callable[[Path], Awaitable[None]], state: dict[str, Any]
    ) -> Path:
        """Write a checkpoint, and delete the oldest ones beyond `keep`.

        `write` fills the directory that it is given. If it fails or the process is killed, earlier
        checkpoints are unchanged and this one does not exist.

        Raises:
            OSError: the disk failed or is full, whatever `write` raised in the latter case.
            Exception: any other that `write` raised.
        """
        text = json.dumps(state, indent=1)  # training may go on while `write` works
        final = self._directory / f"{PREFIX}{step:06d}"
        partial = final.with_name(final.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            await write(partial)
            (partial / TRAINER_STATE).write_text(text)
            await asyncio.to_thread(seal, partial)
        except asyncio.CancelledError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except Exception as error:
            self._refuse_a_full_disk(partial, error)
            raise

        with self._lock:
            if final.exists():  # it is damaged: otherwise the run would have resumed from it
                self._retire(final)
            partial.rename(final)
        _sync_directory(self._directory)
        await asyncio.to_thread(self._prune)
        return final

    def _refuse_a_full_disk(self, partial: Path, cause: Exception) -> None:
        """Delete the partial checkpoint, and raise an OSError where the disk is full.

        The errors of torch and safetensors do not say that the disk was full.
        """
        free = shutil.disk_usage(self._directory).free
        shutil.rmtree(partial, ignore_errors=True)
        if free < FULL_BELOW:
            raise OSError(
                f"trainer.checkpoints: the disk of {self._directory} is full ({free >> 20} MiB "
                f"were free), so {partial.stem} was not written. Free some space, or keep fewer "
                "checkpoints with trainer.checkpoints.keep."
            ) from cause

    def _retire(self, checkpoint: Path) -> Path:
        """Rename a checkpoint before deleting it, so that a half-deleted one is never loaded.

        Returns the new path.
        """
        retired = checkpoint.with_name(checkpoint.name + ".retired" + PARTIAL)
        shutil.rmtree(retired, ignore_errors=True)  # left by a process that was killed here
        checkpoint.rename(retired)
        self._damaged.discard(checkpoint)
        return retired

    def _prune(self) -> None:
        """Delete all but the newest `keep` undamaged checkpoints, and what killed saves left."""
        with self._lock:
            kept = {*self._intact()[-self._keep :], self._held}
            for path in {*self._steps()} - kept:
                self._retire(path)
        for leftover in self._directory.glob(f"{PREFIX}*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)

    @contextmanager
    def held(self, checkpoint: Path) -> Iterator[bool]:
        """Keep a checkpoint while another thread reads it; yield whether it is still there.

        Without that, copies that take longer than the time between two checkpoints would never be
        completed. There is one holder at a time.
        """
        with self._lock:
            assert self._held is None, "one holder at a time"
            there = checkpoint.is_dir()
            self._held = checkpoint if there else None
        try:
            yield there
        finally:
            with self._lock:
                self._held = None
                expired = there and checkpoint not in self._intact()[-self._keep :]
                retired = self._retire(checkpoint) if expired else None
            if retired is not None:  # not by `_prune`, which may not run beside a save
                shutil.rmtree(retired, ignore_errors=True)

    def intact(self) -> list[Path]:
        """Return the complete checkpoints, oldest first, without those that `latest` skipped."""
        with self._lock:
            return self._intact()

    def _intact(self) -> list[Path]:
        return [path for path in self._steps() if path not in self._damaged]

    def _steps(self) -> list[Path]:
        """Return the complete checkpoint directories, oldest first."""
        found = [
            path
            for path in self._directory.glob(f"{PREFIX}*")
            if re.fullmatch(PREFIX + r"\d+", path.name) and path.is_dir()
        ]
        return sorted(found, key=_step_of)

    def latest(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint; log and skip damaged ones."""
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
    """Return the CRC-32 of a file, which detects accidental damage at more than 1 GB/s."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def seal(directory: Path) -> None:
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
    """Return how a checkpoint directory is damaged, or None where it is complete."""
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
