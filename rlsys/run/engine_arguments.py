"""The check of `generation.engine_arguments` against the arguments that the engine has."""

from __future__ import annotations

import ast
import difflib
import fnmatch
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from rlsys.config.engines import ENGINES, EngineTraits
from rlsys.config.generation import EngineConfig


def argument_mistakes(generation: EngineConfig) -> Iterator[str]:
    """Yield a line for each argument that is refused, or that the installed engine lacks."""
    traits = ENGINES[generation.engine]
    if not generation.engine_arguments or "engine_arguments" not in traits.options:
        return  # that they have no effect is said elsewhere

    known = engine_arguments(traits)
    for name in generation.engine_arguments:
        flag = f"generation.engine_arguments.{name}"
        reason = _refusal(name, traits)
        if reason is not None:
            yield f"{flag}: not to be set here. {reason}"
        elif known and name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"Did you mean {', '.join(near)}?" if near else "See its documentation."
            yield f"{flag}: the installed {generation.engine} has no such argument. {hint}"


def _refusal(name: str, traits: EngineTraits) -> str | None:
    """Return why an argument is refused, or None."""
    for pattern, reason in traits.refused_arguments.items():
        if fnmatch.fnmatchcase(name, pattern):
            return reason
    return None


def engine_arguments(traits: EngineTraits) -> frozenset[str]:
    """Return the names of the engine's arguments; none where it is not installed here.

    They are read from its source: importing it takes seconds, and sets up its logging.
    """
    if not traits.arguments_class:
        return frozenset()
    package, file, name = traits.arguments_class.split(":")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return frozenset()

    source = Path(found.origin).parent / file
    (arguments,) = [
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return frozenset(
        field.target.id
        for field in arguments.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )
