"""The model that a path of an evaluation names: also a checkpoint, or the newest one of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rlsys.config.command_line import CONFIG_FILE
from rlsys.models import check_model_path, resolve_model
from rlsys.models.adapters import holds_adapters
from rlsys.run.checkpoints import MANIFEST, TRAINER_STATE, CheckpointStore, find_damage

T = TypeVar("T")

SAMPLED_BLOCKS = 16  # of each file of weights, for the fingerprint
BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model in a local directory."""

    field: str  # model.path or compare
    path: str  # as the user gave it
    directory: Path
    step: int | None  # of the checkpoint; None: it is none

    @property
    def name(self) -> str:
        """The name for people: the path, with the step where the user named a run."""
        is_run = self.step is not None and _step(Path(self.path).expanduser()) is None
        return f"{self.path} (step {self.step})" if is_run else self.path


def check_evaluated_path(path: str, field: str) -> None:
    """Refuse a path that is recognizably wrong, without downloading anything.

    Raises:
        ValueError: see `check_model_path`; a run without a complete checkpoint; a damaged
            checkpoint.
    """
    directory = _checkpoint_directory(path, field)
    if directory is None:
        named(field, lambda: check_model_path(path))


def resolve_evaluated(path: str, field: str) -> EvaluatedModel:
    """Return the model of a path; it is built, merged or fetched on first use.

    Raises:
        ValueError: see `check_evaluated_path` and `resolve_model`.
    """
    directory = _checkpoint_directory(path, field)
    if directory is None:
        directory = named(field, lambda: resolve_model(path))
    whole = directory
    if holds_adapters(directory):
        whole = named(field, lambda: resolve_model(str(directory)))
    return EvaluatedModel(field=field, path=path, directory=whole, step=_step(directory))


def named(field: str, check: Callable[[], T]) -> T:
    """Return the result of a check of model.path; a message about it then names `field`."""
    try:
        return check()
    except ValueError as error:
        lines = [_renamed(line, field) for line in str(error).splitlines()]
        raise ValueError("\n".join(lines)) from error


def _renamed(line: str, field: str) -> str:
    prefix = "model.path:"
    return f"{field}:{line.removeprefix(prefix)}" if line.startswith(prefix) else line


def _checkpoint_directory(path: str, field: str) -> Path | None:
    """Return the checkpoint that a path names, itself or as a run; None: it names neither."""
    place = Path(path).expanduser()
    if (place / CONFIG_FILE).is_file() and (place / "checkpoints").is_dir():
        checkpoint = CheckpointStore(place / "checkpoints", keep=1).latest()
        if checkpoint is None:
            raise ValueError(
                f"{field}: the run {path!r} has no complete checkpoint. Continue it with --resume, "
                "or give another model."
            )
        return checkpoint.path
    if (place / TRAINER_STATE).is_file():
        damage = find_damage(place)
        if damage is not None:
            raise ValueError(
                f"{field}: the checkpoint {path!r} is damaged ({damage}). Give another checkpoint, "
                "or the run's directory, which stands for the newest undamaged one."
            )
        return place
    return None


def _step(directory: Path) -> int | None:
    state = directory / TRAINER_STATE
    return json.loads(state.read_text())["step"] if state.is_file() else None


def model_fingerprint(directory: Path) -> str:
    """Return a hash that tells models apart, in a moment also for large ones.

    Of files with weights it covers the size and 16 blocks of 64 KiB spread over the file, of all
    others the whole. Two checkpoints of one run differ nearly everywhere.
    """
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        # The state of a trainer and the seal of a checkpoint do not change what is sampled.
        if not file.is_file() or file.name in (MANIFEST, TRAINER_STATE):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
                digest.update(stream.read())
                continue
            for block in range(SAMPLED_BLOCKS):
                stream.seek((size - BLOCK_BYTES) * block // (SAMPLED_BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
