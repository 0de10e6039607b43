"""The text of --help: every flag with its type, its description, and its value in this recipe."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from rlsys.config.fields import all_fields, type_name
from rlsys.config.function_help import FunctionHelp, function_help
from rlsys.config.presets import PRESETS
from rlsys.config.root import RootConfig


def help_text(config: RootConfig, switches: Mapping[str, str]) -> str:
    """Return all flags, and the keyword parameters of the functions that `config` chooses."""
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    tree = config.model_dump(mode="json")
    introduction = (
        f"Recipe {config.recipe}. Every flag is shown with its value in brackets. Values are YAML; "
        "a list may also be written a,b."
    )
    lines = [*textwrap.wrap(introduction, width), ""]
    for flag, doc in switches.items():
        lines += _entry(flag, doc, width)

    section = None
    for name, field in all_fields(type(config)):
        if name.split(".")[0] != section:
            section = name.split(".")[0]
            lines += ["", f"{section}:"]
        value: Any = tree
        for part in name.split("."):
            value = value[part]
        head = f"--{name} {type_name(field.annotation)}"
        lines += _entry(head, f"{field.description} [{_as_yaml(value)}]", width)
        if name == "preset":
            lines += _preset_entries(width)
        lines += _chosen_functions(config, name, width)
    return "\n".join(lines)


def _chosen_functions(config: Any, field: str, width: int) -> Iterator[str]:
    """Yield the help of the functions that `field` chooses or passes parameters to."""
    if field.startswith("algorithm."):
        yield from _algorithm_functions(config, field, width)
    elif field == "reward.functions":
        for reward in config.reward.functions:
            yield from _function_entry(
                config, "register_reward_function", reward.name, reward.parameters, width
            )


def _algorithm_functions(config: Any, field: str, width: int) -> Iterator[str]:
    advantage, objective = config.algorithm.advantage, config.algorithm.objective
    if field == "algorithm.advantage.parameters":
        yield from _function_entry(
            config, "register_advantage_estimator", advantage.name, advantage.parameters, width
        )
    elif field == "algorithm.objective.ratio":
        yield from _function_entry(config, "register_ratio", objective.ratio, {}, width)
    elif field == "algorithm.objective.parameters":
        yield from _function_entry(
            config, "register_weight", objective.weight, objective.parameters, width
        )


def _function_entry(
    config: RootConfig, decorator: str, name: str, parameters: Mapping[str, Any], width: int
) -> Iterator[str]:
    found = function_help(decorator, name, config.plugins)
    if found is None:
        yield f"        {name}: its source code was not found."
        return
    yield from _wrapped(f"{name}: {found.summary}", width, first=8, rest=8)
    yield from _keyword_entries(found, parameters, width)


def _keyword_entries(
    found: FunctionHelp, parameters: Mapping[str, Any], width: int
) -> Iterator[str]:
    for keyword in found.keywords:
        given = keyword.name in parameters
        value = _as_yaml(parameters[keyword.name]) if given else keyword.default
        shown = f"[{value}]" if value else "(required)"
        meaning = f": {keyword.meaning}" if keyword.meaning else ""
        text = f".{keyword.name} {keyword.type}{meaning} {shown}"
        yield from _wrapped(text, width, first=10, rest=12)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]


def _wrapped(text: str, width: int, *, first: int, rest: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=" " * first, subsequent_indent=" " * rest)


def _preset_entries(width: int) -> list[str]:
    """Return a line or two for each preset, with its name in a column of its own."""
    column = max(map(len, PRESETS)) + 10
    lines: list[str] = []
    for name, preset in PRESETS.items():
        head = f"{'':8}{name}".ljust(column)
        lines += textwrap.wrap(
            preset.description, width, initial_indent=head, subsequent_indent=" " * column
        )
    return lines


def _entry(head: str, doc: str, width: int) -> list[str]:
    return [
        f"  {head}",
        *textwrap.wrap(doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]
