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


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    path: Path
    state: dict[str, Any]  # the driver's


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory = directory
        self._keep = keep

    async def save(self, step: int, write: Callable[[Path], Awaitable[None]], state: dict[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest beyond `keep`. `write` fills the directory that it is given.

        Whatever happens meanwhile, earlier checkpoints stay as they were.
        """
        final = self._directory / f"{PREFIX}{step:06d}"
        partial = final.with_name(final.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        await write(partial)
        (partial / TRAINER_STATE).write_text(json.dumps(state, indent=1))
        await asyncio.to_thread(_seal, partial)
        if final.exists():  # a resumed run may pass the same step again
            shutil.rmtree(final)
        partial.rename(final)
        _sync_directory(self._directory)
        self._prune()
        return final

    def _prune(self) -> None:
        for path in self._steps()[: -self._keep]:
            shutil.rmtree(path)
        for leftover in self._directory.glob(f"{PREFIX}*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _steps(self) -> list[Path]:
        """Renamed checkpoint directories, oldest first."""
        return sorted(path for path in self._directory.glob(f"{PREFIX}*") if path.is_dir() and path.suffix != PARTIAL)

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; damaged ones are named in the log and passed over."""
        for path in reversed(self._steps()):
            damage = find_damage(path)
            if damage is None:
                return Checkpoint(
                    step=int(path.name.removeprefix(PREFIX)), path=path, state=json.loads((path / TRAINER_STATE).read_text())
                )
            logger.warning("checkpoint %s is damaged (%s): using the one before it", path, damage)
        return None


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _seal(directory: Path) -> None:
    """Flush every file to the disk, then write the manifest."""
    files = {}
    for file in sorted(directory.iterdir()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        files[file.name] = {"bytes": file.stat().st_size, "crc32": _checksum(file)}
    manifest = directory / MANIFEST
    with manifest.open("w") as stream:
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
    if TRAINER_STATE not in files:
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
