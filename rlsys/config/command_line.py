"""From a recipe, a YAML file and flags to one validated `RunConfig`.

    python -m recipes.grpo_math --config run.yaml --trainer.steps 50 --algorithm.advantage.parameters.std_ddof 1

Later wins: recipe, then the file, then flags in their order. Every field is a flag; values are YAML.
"""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rlsys.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """What the user asked for."""

    config: RunConfig
    dry_run: bool
    resume: bool


class HelpRequested(Exception):  # noqa: N818  (no error)
    """--help was given; the text is the argument."""


class ConfigError(ValueError):
    """One or more mistakes in a configuration, a line each."""


SWITCHES = {
    "--config": "YAML file with any of the fields below, nested as they are.",
    "--dry-run": "Check everything, print the configuration and the plan, start nothing.",
    "--resume": "Continue the run in run.directory from its newest complete checkpoint.",
    "--help": "Show this text.",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the floats of YAML 1.2: 1e-5 is a number."""


_Loader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def evolve(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with some fields changed, by dotted name, and validated anew: how a recipe starts from another.

    Example: `evolve(grpo_math(hardware), {"algorithm.advantage.name": "rloo", "trainer.steps": 100})`.

    Raises:
        ConfigError: unknown field or unfit value.
    """
    tree = config.model_dump(mode="json")
    for name, value in changes.items():
        _put(tree, name, value)
    return _validated(tree)


def parse(recipe: RunConfig, arguments: Sequence[str]) -> Invocation:
    """Apply the command line to a recipe's configuration.

    Raises:
        ConfigError: unknown flag or field, unreadable file, unfit value; every problem found, a line each.
        HelpRequested: --help.
    """
    if "--help" in arguments or "-h" in arguments:
        raise HelpRequested(help_text(recipe))
    tree = recipe.model_dump(mode="json")
    options = list(_options(arguments))
    for file in (value for name, value in options if name == "--config"):
        _merge(tree, _read_yaml(file), ())
    for name, value in options:
        if name not in SWITCHES:
            _put(tree, name.removeprefix("--"), _parse_value(name.removeprefix("--"), value))
    names = {name for name, _ in options}
    return Invocation(
        config=_validated(tree), dry_run="--dry-run" in names, resume="--resume" in names
    )


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(flag, value) pairs from `--flag value`, `--flag=value` and bare `--flag`."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"{word!r}: expected a flag such as --trainer.steps 50. Quote values that contain spaces."
            )
        name, equals, value = word.partition("=")
        if (
            name == "--plugins"
            or name in SWITCHES
            or _field_at(name.removeprefix("--")) is not None
        ):
            takes_value = name not in ("--dry-run", "--resume")
            if equals:
                yield name, value
            elif takes_value and rest and not re.match(r"--[a-z]", rest[0]):
                yield name, rest.pop(0)
            else:
                yield name, None
        else:
            known = [*SWITCHES, *(f"--{field}" for field, _ in all_fields())]
            near = (
                difflib.get_close_matches(name, known, n=3)
                or [flag for flag in known if name.strip("-").split(".")[-1] in flag][:3]
            )
            raise ConfigError(
                f"{name}: no such flag."
                + (f" Did you mean {', '.join(near)}?" if near else " See --help.")
            )


def _parse_value(name: str, text: str | None) -> Any:
    if text is None:
        annotation = getattr(_field_at(name), "annotation", None)
        if annotation is bool:
            return True
        raise ConfigError(f"{name}: a value is missing. Write --{name} VALUE.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{name}: {text!r} is no YAML value ({' '.join(str(error).split())}). Quote it."
        ) from error
    field = _field_at(name)
    if (
        field is not None
        and _is_tuple(field.annotation)
        and not isinstance(value, list | type(None))
    ):
        if isinstance(value, Mapping):
            return [value]
        return [yaml.load(part, _Loader) for part in text.split(",") if part]
    if (
        field is not None
        and field.annotation in (str, str | None)
        and value is not None
        and not isinstance(value, str)
    ):
        return text
    return value


def _is_tuple(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_is_tuple(part) for part in get_args(annotation))
    return get_origin(annotation) is tuple


def _field_at(name: str) -> FieldInfo | None:
    """The field that a dotted name leads to; a name below a dict of parameters leads to that dict."""
    model: type[BaseModel] = RunConfig
    field: FieldInfo | None = None
    parts = name.split(".")
    for i, part in enumerate(parts):
        field = model.model_fields.get(part.replace("-", "_"))
        if field is None:
            return None
        if get_origin(field.annotation) is dict:
            return field if i == len(parts) - 1 else FieldInfo(annotation=Any)  # pyright: ignore[reportArgumentType]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
        elif i < len(parts) - 1:
            return None
    return field


def all_fields(
    model: type[BaseModel] = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf field with its dotted name, in the order of the models."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.replace("-", "_").split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{name}: {part} holds a value, not fields")
    tree[last] = value


def _merge(tree: dict[str, Any], changes: Mapping[str, Any], path: tuple[str, ...]) -> None:
    """Lay a nested mapping over the tree; free dicts (parameters) are replaced as a whole."""
    for key, value in changes.items():
        field = _field_at(".".join((*path, key)))
        is_section = (
            field is not None
            and isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
        )
        if is_section and isinstance(value, Mapping):
            _merge(tree[key], value, (*path, key))
        else:
            tree[key] = value


def _read_yaml(file: str | None) -> dict[str, Any]:
    if file is None:
        raise ConfigError("--config: the name of a YAML file is missing.")
    try:
        content = yaml.load(Path(file).read_text(), _Loader)
    except OSError as error:
        raise ConfigError(
            f"--config: cannot read {file!r} ({error.strerror}). Give an existing YAML file."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--config: {file!r} is no YAML ({' '.join(str(error).split())}). Mend the file."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config: {file!r} must hold fields such as `trainer: {{steps: 50}}`, not a {type(content).__name__}."
        )
    return content


def _validated(tree: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_message(problem) for problem in error.errors())) from None


def _message(problem: Any) -> str:
    """One line for one pydantic error: field, value, expectation, and where to look."""
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        siblings = [
            field.rsplit(".", 1)[-1]
            for field, _ in all_fields()
            if field.startswith(".".join(location[:-1]))
        ]
        near = difflib.get_close_matches(location[-1], siblings, n=2)
        return f"{name}: no such field." + (
            f" Did you mean {' or '.join(near)}?" if near else " See --help."
        )
    field = _field_at(name)
    remedy = f" ({field.description})" if field is not None and field.description else ""
    return f"{name}: {problem['input']!r} does not fit: {problem['msg'][0].lower()}{problem['msg'][1:]}.{remedy}"


def dump_yaml(config: RunConfig) -> str:
    """A configuration as YAML that `--config` reads back to the same."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120
    )


def load_yaml(path: Path) -> RunConfig:
    """What `dump_yaml` wrote.

    Raises:
        ConfigError: unreadable, or not a configuration.
    """
    return _validated(_read_yaml(str(path)))


def type_name(annotation: Any) -> str:
    """An annotation as people write it: int, text, a|b, list of int, ..."""
    if annotation is type(None):
        return "null"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in parts)
    if origin is tuple:
        return f"list of {type_name(parts[0])}"
    if origin is dict:
        return "mapping"
    if parts and origin is not None:  # Literal
        return "|".join(map(str, parts))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return {str: "text", bool: "true|false"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def help_text(recipe: RunConfig) -> str:
    """All flags with type, default of this recipe, and documentation."""
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    tree = recipe.model_dump(mode="json")
    lines = [f"Recipe {recipe.recipe}. Flags (values are YAML; lists may be written a,b):", ""]
    for flag, doc in SWITCHES.items():
        lines += _entry(flag, doc, width)
    section = None
    for name, field in all_fields():
        if name.split(".")[0] != section:
            section = name.split(".")[0]
            lines += ["", f"{section}:"]
        value: Any = tree
        for part in name.split("."):
            value = value[part]
        shown = yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]
        lines += _entry(
            f"--{name} {type_name(field.annotation)}", f"{field.description} [{shown}]", width
        )
    return "\n".join(lines)


def _entry(head: str, doc: str, width: int) -> list[str]:
    return [
        f"  {head}",
        *textwrap.wrap(doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]
