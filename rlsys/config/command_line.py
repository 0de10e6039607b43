"""The command line: one validated configuration from a recipe, a YAML file and flags.

    python -m recipes.grpo_math --preset gspo --config run.yaml --trainer.steps 50

Later overrides earlier: recipe, preset, file, other flags in their order. Every field is a flag;
values are YAML. With `--resume` the run's own `config.yaml` takes the place of the recipe; with
`--resume auto` where there is one. The kind of run is that of the recipe: the class of the
configuration that it returns.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rlsys.config.errors import ConfigError
from rlsys.config.fields import all_fields, field_at
from rlsys.config.help_text import help_text
from rlsys.config.presets import preset_called
from rlsys.config.renamed_fields import REMOVED_FIELDS, refuse_old_names, translated
from rlsys.config.root import CONTRADICTIONS_LATER, RootConfig, RunSection
from rlsys.config.run import RunConfig
from rlsys.config.secrets import refuse_secrets
from rlsys.config.storage_uri import storage_mistake

RootT = TypeVar("RootT", bound=RootConfig)


@dataclass(frozen=True, kw_only=True)
class Invocation(Generic[RootT]):
    """A parsed command line."""

    config: RootT  # its fields may contradict each other: `rlsys.run.preflight` checks that
    dry_run: bool
    resume: bool
    explicit: frozenset[str]  # dotted names of the fields that flags and files set on purpose
    saved: Mapping[str, Any] | None = None  # on a resume: the run's own configuration, before flags


class HelpRequested(Exception):  # noqa: N818  (no error)
    """A request for --help; its argument is the text to print."""


SWITCHES = {
    "--config": "YAML file with any of the fields below, nested by their sections.",
    "--dry-run": "Check everything and print the configuration and the plan, but start nothing.",
    "--resume": (
        "Continue the run in run.directory from its newest complete checkpoint, with the run's own "
        "configuration. --config and other flags change fields of it. --resume auto: start the run "
        "where there is none yet, so that one command starts and continues it."
    ),
    "--help": (
        "Print this text. It includes the parameters of the estimator, the objective and the "
        "rewards that the other flags choose."
    ),
}


class _Loader(yaml.SafeLoader):
    """Loader of YAML 1.1 with the floats of YAML 1.2: 1e-5 is a number."""


_Loader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


AUTO = "auto"  # value of --resume

# The other files of a run's directory: rlsys.run.directory.
CONFIG_FILE = "config.yaml"
# Parameters belong to the function that the second field names. Where that field changes, the old
# parameters are dropped, and the new function starts from its own defaults.
OWNERS = {
    "algorithm.advantage.parameters": "algorithm.advantage.name",
    "algorithm.objective.parameters": "algorithm.objective.weight",
}

Change = tuple[str, Any]  # a dotted name and its new value


def evolve(config: RootT, changes: Mapping[str, Any]) -> RootT:
    """Return `config` with some fields changed, by dotted name, and validated again.

    A recipe starts from another one with it:

        evolve(grpo_math(hardware), {"algorithm.advantage.name": "rloo", "trainer.steps": 100})

    Raises:
        ConfigError: unknown field or invalid value.
    """
    refuse_old_names(changes)
    tree = config.model_dump(mode="json")
    _start_from_preset(tree, changes)
    _apply(tree, list(changes.items()))
    return _validated(tree, type(config))


def parse(recipe: RootT, arguments: Sequence[str]) -> Invocation[RootT]:
    """Apply the command line to a recipe's configuration, or with --resume to that of the run.

    Raises:
        ConfigError: unknown flag or field, unreadable file, invalid value, a secret, no run to
            resume; a line for each mistake.
        HelpRequested: --help.
    """
    invocation = _parsed(recipe, arguments)
    refuse_secrets(invocation.config)
    return invocation


def _parsed(recipe: RootT, arguments: Sequence[str]) -> Invocation[RootT]:
    if "--help" in arguments or "-h" in arguments:
        raise HelpRequested(help_text(_chosen(recipe, arguments), SWITCHES))

    model = type(recipe)
    options = list(_options(arguments, model))
    switches = {name for name, _ in options}
    from_files, from_flags = _changes(options, model)
    dry_run, resume_auto = "--dry-run" in switches, ("--resume", AUTO) in options
    if "--resume" in switches:
        directory = _directory_to_resume(recipe, [*from_files, *from_flags], auto=resume_auto)
        if not resume_auto or holds_run(directory):
            return _resumed(recipe, directory, from_files, from_flags, dry_run=dry_run)

    tree = recipe.model_dump(mode="json")
    _start_from_preset(tree, dict([*from_files, *from_flags]))
    explicit = _explicit(tree, from_files, from_flags)
    _apply(tree, [*from_files, *from_flags])
    config = _validated(tree, model, context=CONTRADICTIONS_LATER)
    if resume_auto and _was_claimed(config.run.given_directory):
        saved = flat(config.model_dump(mode="json"))
        return Invocation(
            config=config, dry_run=dry_run, resume=True, explicit=explicit, saved=saved
        )
    return Invocation(config=config, dry_run=dry_run, resume=False, explicit=explicit)


def _changes(
    options: Sequence[tuple[str, str | None]], model: type[RootConfig]
) -> tuple[list[Change], list[Change]]:
    """Return the fields that files set, and those that flags set."""
    from_files: list[Change] = []
    for name, file in options:
        if name == "--config":
            from_files += _leaves(_with_current_names(_read_yaml(file, "--config")), model)
    from_flags: list[Change] = []
    for name, value in options:
        if name not in SWITCHES:
            field = _normal(name)
            from_flags.append((field, _parse_value(field, value, model)))
    return from_files, from_flags


def places_to_resume(recipe: RootConfig, arguments: Sequence[str]) -> RunSection | None:
    """Return directory and storage of the run that --resume continues; None without --resume.

    The storage is the one that flags or files name, else that of the run's own configuration. The
    directory need not exist: the storage may hold the run.

    Raises:
        ConfigError: see `parse`.
    """
    if "--help" in arguments or "-h" in arguments:
        return None
    options = list(_options(arguments, type(recipe)))
    if "--resume" not in {name for name, _ in options}:
        return None

    given = dict(change for changes in _changes(options, type(recipe)) for change in changes)
    section = _run_section(recipe, given)
    directory = section.given_directory
    if directory is None or "run.storage" in given:
        return section
    file = _config_file(directory)
    if not file.is_file():
        return section
    saved = flat(_read_yaml(str(file), "run.directory")).get("run.storage")
    return _run_section(recipe, {"run.directory": directory, "run.storage": saved})


def _run_section(recipe: RootConfig, given: Mapping[str, Any]) -> RunSection:
    """Return the directory and storage of a run, with the changes of the command line."""
    values = {
        name: given.get(f"run.{name}", getattr(recipe.run, name))
        for name in ("directory", "storage")
    }
    texts = {name: value for name, value in values.items() if isinstance(value, str) and value}
    mistake = storage_mistake(texts["storage"]) if "storage" in texts else None
    if mistake is not None:
        raise ConfigError(mistake)
    return RunSection.model_validate(texts)


def _chosen(recipe: RootT, arguments: Sequence[str]) -> RootT:
    """Return the configuration of the arguments besides --help; the recipe where they fail."""
    without_help = [word for word in arguments if word not in ("--help", "-h")]
    try:
        return parse(recipe, without_help).config
    except ConfigError:
        return recipe


def _directory_to_resume(recipe: RootConfig, changes: list[Change], *, auto: bool) -> str:
    """Return the directory of the run to continue.

    Raises:
        ConfigError: neither the recipe nor the changes name one, or their storage holds no run.
    """
    section = _run_section(recipe, dict(changes))
    directory = section.given_directory
    if directory is not None:
        if section.storage and not auto and not _config_file(directory).is_file():
            raise ConfigError(
                f"run.storage: {section.storage!r} holds no run to resume, nor does run.directory "
                f"{directory!r}. Name the place of an earlier run, or leave out --resume."
            )
        return directory
    if auto:
        raise ConfigError(
            "run.directory: --resume auto needs a directory of its own, in which the next start of "
            "the same command finds the run. Add --run.directory /PATH/NAME."
        )
    raise ConfigError(
        "run.directory: --resume needs the directory of the run. Add --run.directory runs/NAME."
    )


def holds_run(directory: str) -> bool:
    """Return whether a run was started in a directory and wrote its configuration."""
    file = _config_file(directory)
    return file.is_file() and file.stat().st_size > 0


def _was_claimed(directory: str | None) -> bool:
    """Return whether a run took a directory and ended before it wrote its configuration."""
    assert directory, "--resume auto without a directory is refused"
    return _config_file(directory).is_file() and not holds_run(directory)


def _config_file(directory: str) -> Path:
    return Path(directory).expanduser() / CONFIG_FILE


def _resumed(
    recipe: RootT,
    directory: str,
    from_files: list[Change],
    from_flags: list[Change],
    *,
    dry_run: bool,
) -> Invocation[RootT]:
    """Return the run's own configuration with the changes applied to it."""
    changes = [*from_files, *from_flags]
    given = dict(changes)
    tree = saved_configuration(directory, type(recipe))
    saved = flat(tree)
    name = given.get("recipe", recipe.recipe)
    if name != saved.get("recipe", name):
        raise ConfigError(
            f"recipe: this is {name}, but the run in {directory!r} was started by "
            f"{saved['recipe']}. Resume it with that recipe's command, or add --recipe "
            f"{saved['recipe']}: its own configuration is used either way."
        )

    _start_from_preset(tree, given)
    explicit = _explicit(tree, from_files, from_flags)
    _apply(tree, [*changes, ("run.directory", directory)])
    try:
        config = _validated(tree, type(recipe), context=CONTRADICTIONS_LATER)
    except ConfigError as error:
        # The value may be one that the user did not type.
        origin = f"Values that no flag sets are from {Path(directory) / CONFIG_FILE}."
        lines = [f"{line} {origin}" for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from None
    return Invocation(config=config, dry_run=dry_run, resume=True, explicit=explicit, saved=saved)


def saved_configuration(directory: str, model: type[RootConfig] = RunConfig) -> dict[str, Any]:
    """Return the configuration that a run of the kind `model` saved, as nested values.

    Raises:
        ConfigError: there is no run, or one of another kind or version, with other fields.
    """
    file = Path(directory).expanduser() / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(
            f"run.directory: {directory!r} holds no run to resume. Name the directory of an "
            "earlier run."
        )
    tree = translated(_read_yaml(str(file), "run.directory"))
    names = [name for name, _ in _leaves(tree, model)]
    unknown = [
        name for name in names if field_at(name, model) is None and name not in REMOVED_FIELDS
    ]
    if unknown:
        raise ConfigError(
            f"run.directory: {str(file)!r} was written by another version of rlsys, with "
            f"{', '.join(unknown)}, which this one does not have. Resume with that version, or "
            "start a new run from a checkpoint with --model.path."
        )
    return tree


def _with_current_names(tree: dict[str, Any]) -> dict[str, Any]:
    refuse_old_names(flat(tree))
    return tree


def _normal(flag: str) -> str:
    """Return the dotted name of a flag: trainer.prompts_per_step for --trainer.prompts-per-step."""
    return flag.removeprefix("--").replace("-", "_")


def _explicit(
    tree: Mapping[str, Any], from_files: list[Change], from_flags: list[Change]
) -> frozenset[str]:
    """Return the names of the fields that were set on purpose.

    These are all flags, and the fields of files that differ from `tree`: the file may be a saved
    configuration, which holds every field.
    """
    before = flat(tree)
    explicit = {name for name, _ in from_flags}
    for leaf, value in from_files:
        for name, part in flat({leaf: value}).items():
            if name not in before or before[name] != part:
                explicit.add(name)
    return frozenset(explicit)


def _options(arguments: Sequence[str], model: type[RootConfig]) -> Iterator[tuple[str, str | None]]:
    """Yield (flag, value) pairs from `--flag value`, `--flag=value` and `--flag` alone."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"{word!r}: expected a flag such as --trainer.steps 50. Quote values that contain "
                "spaces."
            )
        name, equals, value = word.partition("=")
        refuse_old_names([_normal(name)], flag="--")
        if name not in SWITCHES and field_at(name.removeprefix("--"), model) is None:
            raise ConfigError(_no_such_flag(name, model))

        takes_value = name != "--dry-run"
        if equals and not takes_value:
            raise ConfigError(f"{word}: {name} takes no value. Write {name}, or leave it out.")
        if name == "--resume":
            yield name, _resume_value(word, rest)
        elif equals:
            yield name, value
        elif takes_value and rest and not re.match(r"--[a-z]", rest[0]):
            yield name, rest.pop(0)
        else:
            yield name, None


def _resume_value(word: str, rest: list[str]) -> str | None:
    """Return "auto" for `--resume auto` and `--resume=auto`, None for `--resume` alone.

    Raises:
        ConfigError: any other value.
    """
    _, equals, value = word.partition("=")
    if not equals:
        if not rest or re.match(r"--[a-z]", rest[0]):
            return None
        value = rest.pop(0)
    if value != AUTO:
        raise ConfigError(
            f"--resume: {value!r} is no value of it. Write --resume alone to continue a run, or "
            "--resume auto to continue it where it exists and else to start it."
        )
    return AUTO


def _no_such_flag(name: str, model: type[RootConfig]) -> str:
    """Return the message about an unknown flag, with the nearest flags that there are."""
    known = [*SWITCHES, *(f"--{field}" for field, _ in all_fields(model))]
    near = difflib.get_close_matches(name, known, n=3)
    if not near:  # the user may have left out the section
        last = name.strip("-").split(".")[-1]
        near = [flag for flag in known if last in flag][:3]
    hint = f"Did you mean {', '.join(near)}?" if near else "See --help."
    return f"{name}: no such flag. {hint}"


def _parse_value(name: str, text: str | None, model: type[RootConfig]) -> Any:
    """Return the value of a flag: YAML, but for lists without brackets and for texts."""
    field = field_at(name, model)
    annotation = None if field is None else field.annotation
    if text is None:
        if annotation is bool:
            return True
        raise ConfigError(f"{name}: a value is missing. Write --{name} VALUE.")
    if not text.strip():
        raise ConfigError(f"{name}: the value is empty. Write --{name} VALUE.")

    value = _yaml_value(name, text)
    if value is None:
        return None
    if _is_tuple(annotation) and not isinstance(value, list):
        if isinstance(value, Mapping):
            return [value]
        return [_yaml_value(name, part) for part in text.split(",") if part]
    # A text that YAML reads as something else, such as a directory named 2024.
    if annotation in (str, str | None) and not isinstance(value, str):
        return text
    return value


def _yaml_value(name: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{name}: {text!r} is not a valid YAML value ({' '.join(str(error).split())}). Quote "
            "it."
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
            raise ConfigError(f"{name}: {part} is a field with a value, not a section")
    tree[last] = value


def _start_from_preset(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put the presets that the changes name, if any, into the tree, before the changes."""
    for prefix, section in _rl_runs(tree):
        name = changes.get(f"{prefix}preset")
        if not name or not isinstance(name, str):
            continue  # a value that is not a text is refused when the configuration is validated
        try:
            preset = preset_called(name)
        except ValueError as error:
            raise ConfigError(f"{prefix}{error}") from None

        section["preset"] = name
        section["algorithm"] = preset.algorithm.model_dump(mode="json")
        _put(section, "policy.num_mini_batches", preset.num_mini_batches)
        _put(section, "critic.enabled", preset.critic)


def _rl_runs(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the tree, and each section of it that is an RL run, with the prefix of its fields."""
    yield "", tree
    for name, section in tree.items():
        if isinstance(section, dict) and "preset" in section:
            yield f"{name}.", section


def _apply(tree: dict[str, Any], changes: Sequence[Change]) -> None:
    """Put changes into the tree in their order.

    Parameters of a function that the changes replace by another one are dropped first.
    """
    last = dict(changes)
    before = flat(tree)
    for prefix, section in _rl_runs(tree):
        for parameters, owner in OWNERS.items():
            name = f"{prefix}{owner}"
            if name in last and last[name] != before.get(name):
                _put(section, parameters, {})
    for name, value in changes:
        _put(tree, name, value)


def _leaves(tree: Mapping[Any, Any], model: type[RootConfig], prefix: str = "") -> Iterator[Change]:
    """Yield the fields of nested mappings by dotted name; a dict of parameters is one field."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        field = field_at(name, model)
        is_section = (
            field is not None
            and isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
        )
        if is_section and isinstance(value, Mapping):
            yield from _leaves(value, model, f"{name}.")
        else:
            yield name, value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings by dotted name, parameters too; an empty mapping is left out."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _read_yaml(file: str | None, field: str) -> dict[str, Any]:
    """Return the content of a YAML file; `field` is the flag that named it, for messages."""
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
            f"{field}: {file!r} is not valid YAML ({' '.join(str(error).split())}). Fix the file."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{field}: {file!r} must hold fields such as `trainer: {{steps: 50}}`, not a "
            f"{type(content).__name__}."
        )
    return content


def _validated(tree: Mapping[str, Any], model: type[RootT], *, context: str | None = None) -> RootT:
    try:
        return model.model_validate(tree, context=context)
    except ValidationError as error:
        places = [mistake["loc"] for mistake in error.errors()]
        lines = []
        for mistake in error.errors():
            # Where an item of a list was refused, pydantic also reports the list as too short.
            if not any(_is_below(place, mistake["loc"]) for place in places):
                lines.append(_message(mistake, model))
        raise ConfigError("\n".join(lines)) from None


def _is_below(place: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(place) > len(other) and place[: len(other)] == other


def _message(mistake: Any, model: type[RootConfig]) -> str:
    """Return one line for one pydantic error: field, value, expectation, and the field's help."""
    text = mistake["msg"]
    if mistake["type"] == "mistakes":
        return text  # whole lines, which name their fields
    location = [str(part) for part in mistake["loc"]]
    if mistake["type"] == "extra_forbidden":
        return _no_such_field(location, model)

    field = _innermost_field(location, model)
    remedy = f" ({field.description})" if field is not None and field.description else ""
    expectation = f"{text[0].lower()}{text[1:]}"
    return f"{'.'.join(location)}: {mistake['input']!r} does not fit: {expectation}.{remedy}"


def _no_such_field(location: list[str], model: type[RootConfig]) -> str:
    """Return the message about an unknown field, with the nearest fields of its section."""
    section = ".".join(location[:-1])
    names = (field for field, _ in all_fields(model) if field.startswith(section))
    siblings = [name.rsplit(".", 1)[-1] for name in names]
    near = difflib.get_close_matches(location[-1], siblings, n=2)
    hint = f"Did you mean {' or '.join(near)}?" if near else "See --help."
    return f"{'.'.join(location)}: no such field. {hint}"


def _innermost_field(location: list[str], model: type[RootConfig]) -> FieldInfo | None:
    """Return the field that a location is, or that it is a part of."""
    for length in range(len(location), 0, -1):
        field = field_at(".".join(location[:length]), model)
        if field is not None:
            return field
    return None


def dump_yaml(config: RootConfig) -> str:
    """Return a configuration as YAML, from which `--config` makes the same configuration."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120
    )


def load_yaml(path: Path, model: type[RootT] = RunConfig) -> RootT:
    """Return the configuration of the kind `model` in a file that `dump_yaml` wrote.

    Raises:
        ConfigError: the file is unreadable, or not a configuration.
    """
    return _validated(_with_current_names(_read_yaml(str(path), str(path))), model)
