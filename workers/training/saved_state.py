"""The files of one trained model in a checkpoint: its backend's, and a few facts as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.training.backends.backend import ModelBackend
from workers.training.sharded_checkpoint import RankFiles


def state_file(role: str) -> str:
    """Return the name of the file with the facts of the model called `role`."""
    return f"{role}_state.json"


def save_backend(backend: ModelBackend[Any], path: Path) -> None:
    """Write weights and optimizer state; collective."""
    files = RankFiles(path)
    backend.save(files)
    files.finish()


def save_state(
    backend: ModelBackend[Any], files: RankFiles, *, role: str, facts: Mapping[str, Any]
) -> None:
    """Write weights, optimizer state and `facts`, which are the same on all ranks; collective."""
    backend.save(files)
    if files.rank == 0:
        file, text = files.path / state_file(role), json.dumps(dict(facts))
        files.write(lambda: file.write_text(text))


def load_state(backend: ModelBackend[Any], path: Path, *, role: str) -> dict[str, Any]:
    """Load what any number of ranks wrote with `save_state`, and return its facts; collective.

    Raises:
        ValueError: the checkpoint is of another model, or its files are damaged.
    """
    facts = json.loads((path / state_file(role)).read_text())
    backend.load(path)
    return facts
