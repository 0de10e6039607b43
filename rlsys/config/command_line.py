"""From a recipe, a YAML file and flags to one validated `RunConfig`.

    python -m recipes.grpo_math --preset gspo --config run.yaml --trainer.steps 50

Later wins: recipe, preset, file, other flags in their order. Every field is a flag; values are YAML.
With `--resume` the run's own `config.yaml` stands in the place of the recipe.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rlsys.config.errors import ConfigError
from rlsys.config.fields import all_fields, field_at
from rlsys.config.help_text import help_text
from rlsys.config.presets import preset_called
from rlsys.config.renamed_fields import REMOVED_FIELDS, refuse_old_names, translated
from rlsys.config.run import CONTRADICTIONS_LATER, RunConfig


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """What the user asked for."""

    config: RunConfig  # its fields may contradict each other: `rlsys.run.preflight` says so
    dry_run: bool
    resume: bool
    explicit: frozenset[str]  # dotted names that flags and files set to something of their own
    saved: Mapping[str, Any] | None = None  # on a resume: the run's own configuration, before flags


class HelpRequested(Exception):  # noqa: N818  (no error)
    """--help was given; the text is the argument."""


SWITCHES = {
    "--config": "YAML file with any of the fields below, nested as they are.",
    "--dry-run": "Check everything, print the configuration and the plan, start nothing.",
    "--resume": "Continue the run in run.directory from its newest complete checkpoint, with its own configuration. "
    "--config and flags change fields of that.",
    "--help": "Show this text, with the parameters of the functions that the other flags choose.",
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


# What a run's directory holds besides: see rlsys.run.directory.
CONFIG_FILE = "config.yaml"
# Parameters belong to the function that is named beside them: another function starts from its own defaults.
OWNERS = {
    "algorithm.advantage.parameters": "algorithm.advantage.name",
    "algorithm.objective.parameters": "algorithm.objective.weight",
}

Change = tuple[str, Any]  # a dotted name, and its new value


def evolve(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with some fields changed, by dotted name, and validated anew: how a recipe starts from another.

    Example: `evolve(grpo_math(hardware), {"algorithm.advantage.name": "rloo", "trainer.steps": 100})`.

    Raises:
        ConfigError: unknown field or unfit value.
    """
    refuse_old_names(changes)
    tree = config.model_dump(mode="json")
    _start_from_preset(tree, changes)
    _lay_over(tree, list(changes.items()))
    return _validated(tree)


def parse(recipe: RunConfig, arguments: Sequence[str]) -> Invocation:
    """Apply the command line to a recipe's configuration, or with --resume to that of the run.

    Raises:
        ConfigError: unknown flag or field, unreadable file, unfit value, no run to resume; every problem found, a line each.
        HelpRequested: --help.
    """
    if "--help" in arguments or "-h" in arguments:
        raise HelpRequested(help_text(_chosen(recipe, arguments), SWITCHES))
    options = list(_options(arguments))
    switches = {name for name, _ in options}
    from_files = [
        change
        for name, file in options
        if name == "--config"
        for change in _leaves(_with_present_names(_read_yaml(file, "--config")))
    ]
    from_flags = [
        (_normal(name), _parse_value(_normal(name), value))
        for name, value in options
        if name not in SWITCHES
    ]
    if "--resume" in switches:
        return _resumed(recipe, from_files, from_flags, dry_run="--dry-run" in switches)
    tree = recipe.model_dump(mode="json")
    _start_from_preset(tree, dict([*from_files, *from_flags]))
    explicit = _explicit(tree, from_files, from_flags)
    _lay_over(tree, [*from_files, *from_flags])
    config = _validated(tree, context=CONTRADICTIONS_LATER)
    return Invocation(
        config=config, dry_run="--dry-run" in switches, resume=False, explicit=explicit
    )


def _chosen(recipe: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Return the configuration that the other arguments ask for, or the recipe's where they are wrong."""
    others = [word for word in arguments if word not in ("--help", "-h")]
    try:
        return parse(recipe, others).config
    except ConfigError:
        return recipe


def _resumed(
    recipe: RunConfig, from_files: list[Change], from_flags: list[Change], *, dry_run: bool
) -> Invocation:
    """The run's own configuration with the changes laid over it."""
    changes = [*from_files, *from_flags]
    given = dict(changes)
    directory = given.get("run.directory", recipe.run.directory)
    if not isinstance(directory, str) or not directory:
        raise ConfigError(
            "run.directory: --resume needs the directory of the run. Add --run.directory runs/NAME."
        )
    tree = saved_configuration(directory)
    saved = flat(tree)
    name = given.get("recipe", recipe.recipe)
    if name != saved.get("recipe", name):
        raise ConfigError(
            f"recipe: this is {name}, but the run in {directory!r} was started by {saved['recipe']}. Resume it with that recipe's command, "
            f"or add --recipe {saved['recipe']}: its own configuration is used either way."
        )
    _start_from_preset(tree, given)
    explicit = _explicit(tree, from_files, from_flags)
    _lay_over(tree, [*changes, ("run.directory", directory)])
    try:
        config = _validated(tree, context=CONTRADICTIONS_LATER)
    except ConfigError as error:
        raise ConfigError(
            "\n".join(
                f"{line} What no flag gives is from {Path(directory) / CONFIG_FILE}."
                for line in str(error).splitlines()
            )
        ) from None
    return Invocation(config=config, dry_run=dry_run, resume=True, explicit=explicit, saved=saved)


def saved_configuration(directory: str) -> dict[str, Any]:
    """The configuration that a run wrote down, as nested values.

    Raises:
        ConfigError: there is no run, or it was written by a version with other fields.
    """
    file = Path(directory).expanduser() / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(
            f"run.directory: {directory!r} holds no run to resume. Name the directory of an earlier run."
        )
    tree = translated(_read_yaml(str(file), "run.directory"))
    names = [name for name, _ in _leaves(tree)]
    unknown = [n for n in names if field_at(n) is None and n not in REMOVED_FIELDS]
    if unknown:
        raise ConfigError(
            f"run.directory: {str(file)!r} was written by another version of rlsys, with {', '.join(unknown)}, which this one does not have. "
            "Resume with that version, or start a new run from a checkpoint with --model.path."
        )
    return tree


def _with_present_names(tree: dict[str, Any]) -> dict[str, Any]:
    refuse_old_names(flat(tree))
    return tree


def _normal(flag: str) -> str:
    """The dotted name of a flag: --trainer.prompts-per-step is trainer.prompts_per_step."""
    return flag.removeprefix("--").replace("-", "_")


def _explicit(
    tree: Mapping[str, Any], from_files: list[Change], from_flags: list[Change]
) -> frozenset[str]:
    """Names that were set on purpose: all flags, and what a file says otherwise than `tree`, so that a whole file may be given back."""
    before = flat(tree)
    otherwise = {
        name
        for leaf, value in from_files
        for name, part in flat({leaf: value}).items()
        if before.get(name, before) != part
    }
    return frozenset(otherwise | {name for name, _ in from_flags})


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
        refuse_old_names([_normal(name)], flag="--")
        if name == "--plugins" or name in SWITCHES or field_at(name.removeprefix("--")) is not None:
            takes_value = name not in ("--dry-run", "--resume")
            if equals and not takes_value:
                raise ConfigError(f"{word}: {name} takes no value. Write {name}, or leave it out.")
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
        annotation = getattr(field_at(name), "annotation", None)
        if annotation is bool:
            return True
        raise ConfigError(f"{name}: a value is missing. Write --{name} VALUE.")
    if not text.strip():
        raise ConfigError(f"{name}: the value is empty. Write --{name} VALUE.")
    value = _yaml_value(name, text)
    field = field_at(name)
    if (
        field is not None
        and _is_tuple(field.annotation)
        and not isinstance(value, list | type(None))
    ):
        if isinstance(value, Mapping):
            return [value]
        return [_yaml_value(name, part) for part in text.split(",") if part]
    if (
        field is not None
        and field.annotation in (str, str | None)
        and value is not None
        and not isinstance(value, str)
    ):
        return text
    return value


def _yaml_value(name: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{name}: {text!r} is no YAML value ({' '.join(str(error).split())}). Quote it."
        ) from error


def _is_tuple(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_is_tuple(part) for part in get_args(annotation))
    return get_origin(annotation) is tuple


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.replace("-", "_").split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{name}: {part} holds a value, not fields")
    tree[last] = value


def _start_from_preset(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put the preset that the changes name, if any, into the tree: they are laid over it."""
    name = changes.get("preset")
    if not name or not isinstance(name, str):
        return  # what is no text is refused with the other values
    try:
        preset = preset_called(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    tree["preset"] = name
    tree["algorithm"] = preset.algorithm.model_dump(mode="json")
    _put(tree, "policy.num_mini_batches", preset.num_mini_batches)


def _lay_over(tree: dict[str, Any], changes: Sequence[Change]) -> None:
    """Put changes into the tree in their order; parameters of a function that another one replaces are dropped first."""
    last, before = dict(changes), flat(tree)
    for parameters, owner in OWNERS.items():
        if owner in last and last[owner] != before.get(owner):
            _put(tree, parameters, {})
    for name, value in changes:
        _put(tree, name, value)


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[Change]:
    """The fields of nested mappings by dotted name; free dicts (parameters) are one field each."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        field = field_at(name)
        is_section = (
            field is not None
            and isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
        )
        if is_section and isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted name, parameters too; an empty one has no name."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return leaves


def _read_yaml(file: str | None, field: str) -> dict[str, Any]:
    """What a YAML file holds; `field` is the flag that led to it, for messages."""
    if file is None:
        raise ConfigError(f"{field}: the name of a YAML file is missing.")
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(
            f"{field}: cannot read {file!r} ({error.strerror}). Give an existing YAML file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{field}: {file!r} is no YAML ({' '.join(str(error).split())}). Mend the file."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{field}: {file!r} must hold fields such as `trainer: {{steps: 50}}`, not a {type(content).__name__}."
        )
    return content


def _validated(tree: Mapping[str, Any], *, context: str | None = None) -> RunConfig:
    try:
        return RunConfig.model_validate(tree, context=context)
    except ValidationError as error:
        places = [problem["loc"] for problem in error.errors()]
        raise ConfigError(
            "\n".join(
                _message(problem)
                for problem in error.errors()
                # A list whose item was refused is also said to be too short.
                if not any(_is_below(place, problem["loc"]) for place in places)
            )
        ) from None


def _is_below(place: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(place) > len(other) and place[: len(other)] == other


def _message(problem: Any) -> str:
    """One line for one pydantic error: field, value, expectation, and where to look."""
    if problem["type"] == "mistakes":
        return problem["msg"]  # whole lines, which name their fields
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
    field = next(
        filter(None, (field_at(".".join(location[:n])) for n in range(len(location), 0, -1))), None
    )
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
    return _validated(_with_present_names(_read_yaml(str(path), str(path))))
