"""The ends of what the actors of a run wrote to stdout and stderr, from Ray's log files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray._private.state
import ray._private.worker

LAST_BYTES = 64 << 10  # of each file


def save_actor_logs(actors: Mapping[str, Any], directory: Path) -> None:
    """Copy the ends of the logs of `actors`, by name, to DIRECTORY/<name>.out and .err.

    Those of actors on other nodes stay there: Ray keeps them below /tmp/ray.
    """
    node = ray._private.worker._global_node
    if node is None:
        return
    logs = Path(node.get_logs_dir_path())
    for name, actor in actors.items():
        info = ray._private.state.actors(actor._actor_id.hex())
        process = info.get("Pid") if info else None
        if not process:
            continue
        for path in logs.glob(f"worker-*-{process}.*"):
            text = _end_of(path)
            if text.strip():
                (directory / f"{name}{path.suffix}").write_bytes(text)


def _end_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - LAST_BYTES))
        return stream.read()
