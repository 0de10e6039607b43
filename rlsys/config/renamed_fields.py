"""Fields that were renamed or removed since an earlier version.

An old name in a flag, a file or a recipe is refused with a message that has the new one. The saved
configuration of a run is translated, so that runs of an earlier version can be resumed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlsys.config.errors import ConfigError

# Old dotted name: new one. Both may be fields, sections, or keyword parameters below `parameters`.
RENAMED_FIELDS: dict[str, str] = {
    "model.reference_path": "reference.path",
    "policy.strategy": "policy.backend",
    "data.levels": "data.where.level",
    "data.subjects": "data.where.subject",
    "algorithm.advantage.network": "algorithm.advantage.auxiliary",
    "policy.mini_batches": "policy.num_mini_batches",
    "policy.share_prompts": "policy.shared_prefix_packing",
    "generation.logprob_gap_tolerance": "generation.logprob_difference_tolerance",
}

# Old dotted name: its replacement. The section that had the field decides which of its values a
# saved configuration may still have.
REMOVED_FIELDS: dict[str, str] = {
    "data.columns.level": "data.where, which names the column itself",
    "data.columns.subject": "data.where, which names the column itself",
}

_MISSING = object()


def new_name(name: str) -> str | None:
    """Return the present name of a field, or None where it was not renamed."""
    for old, new in RENAMED_FIELDS.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return None


def refuse_old_names(names: Iterable[str], *, flag: str = "") -> None:
    """Refuse names of an earlier version; `flag` is the text before a name, such as "--".

    Raises:
        ConfigError: a line for each, with the new name.
    """
    lines = list(_lines(names, flag))
    if lines:
        raise ConfigError("\n".join(lines))


def _lines(names: Iterable[str], flag: str) -> Iterator[str]:
    for name in names:
        new = new_name(name)
        if new is not None:
            yield f"{flag}{name}: this field is now called {new}. Write {flag}{new}."
        if name in REMOVED_FIELDS:
            yield f"{flag}{name}: this field was removed. Use {REMOVED_FIELDS[name]}."


def translated(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values under their present names; where both are given, keep the new one."""
    result = copy.deepcopy(dict(tree))
    for old, new in RENAMED_FIELDS.items():
        value = _taken(result, old.split("."))
        if value is not _MISSING:
            _put(result, new.split("."), value)
    return result


def _taken(tree: dict[str, Any], path: list[str]) -> Any:
    """Remove and return the value at a path; sections that become empty are removed too."""
    first, *rest = path
    if not rest:
        return tree.pop(first, _MISSING)

    section = tree.get(first)
    if not isinstance(section, dict):
        return _MISSING
    value = _taken(section, rest)
    if value is not _MISSING and not section:
        del tree[first]
    return value


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    *sections, last = path
    for section in sections:
        tree = tree.setdefault(section, {})
    present = tree.get(last, _MISSING)
    if isinstance(present, dict) and isinstance(value, dict):
        tree[last] = value | present
    elif present is _MISSING:
        tree[last] = value
