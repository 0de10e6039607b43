"""Whether a run may continue from a checkpoint of another configuration, and with what state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import flat
from rlsys.config.engines import ENGINES
from rlsys.config.renamed_fields import translated
from rlsys.config.resume_rules import rule_of
from rlsys.run.checkpoints import Checkpoint

ENGINE_PACKAGES = (package for traits in ENGINES.values() for package in traits.packages)
LIBRARIES = ("torch", "transformers", "numpy", "ray", *ENGINE_PACKAGES)
ABSENT = "absent"

# What a checkpoint keeps of the advantage controller; a new value of a field makes it start afresh.
ADAPTED = {
    "kl_coefficient": ("algorithm.kl.coefficient",),
    "entropy_temperature": ("algorithm.entropy.temperature",),
    "estimator": ("algorithm.advantage.name",),
}


def describe_origin(config: RunConfig) -> dict[str, Any]:
    """Return the configuration and the versions of the libraries, ready for JSON."""
    return {"config": config.model_dump(mode="json"), "versions": dict(_installed())}


def _installed() -> Iterator[tuple[str, str]]:
    for library in LIBRARIES:
        try:
            yield library, version(library)
        except PackageNotFoundError:
            continue


def saved_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the configuration of the run that wrote a checkpoint, with the names that fields have now."""
    return translated(checkpoint.state["config"])


def check_resumable(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse to continue where the rules of rlsys.config.resume_rules say that nothing fits.

    Raises:
        ConfigError: naming each field, both values, the reason and the remedy, a line each.
    """
    mistakes = [
        f"{name}: {after!r}, but checkpoint {checkpoint.path} was written with {before!r}. "
        f"{rule_of(name).reason} Resume with --{name} {before}, "
        f"or start a new run with --model.path {checkpoint.path}."
        for name, before, after in _changes(saved_config(checkpoint), config)
        if rule_of(name).verdict == "refused" and ABSENT not in (before, after)
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def differences(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """Return what has changed since the checkpoint and may change the result.

    A line each, such as "trainer.steps: 60 -> 80".
    """
    now, before = dict(_installed()), checkpoint.state["versions"]
    libraries = [
        f"{name}: {before.get(name, ABSENT)} -> {now.get(name, ABSENT)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return changes(saved_config(checkpoint), config) + libraries


def changes(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return how `config` differs from a saved one, nested or flat by dotted name, in lines."""
    return [
        f"{name}: {before} -> {after}"
        for name, before, after in _changes(saved, config)
        if rule_of(name).verdict != "silent"
    ]


def _changes(saved: Mapping[str, Any], config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    before, after = flat(saved), flat(config.model_dump(mode="json"))
    for name in sorted({*before, *after}):
        if before.get(name, ABSENT) != after.get(name, ABSENT):
            yield name, before.get(name, ABSENT), after.get(name, ABSENT)


def registered_states(
    checkpoint: Checkpoint, config: RunConfig, names: Iterable[str]
) -> dict[str, Any]:
    """Return what each of the named parts of a run continues from.

    States that an earlier version wrote are brought up to date.

    Raises:
        ConfigError: the checkpoint holds no state of a part.
    """
    names = tuple(names)
    missing = [name for name in names if name not in checkpoint.state]
    if missing:
        raise ConfigError(
            f"checkpoint {checkpoint.path} holds no state of {', '.join(missing)}: another kind of "
            f"run wrote it. Start a new run with --model.path {checkpoint.path}."
        )
    states = {name: checkpoint.state[name] for name in names}
    if "prompts" in states:
        states["prompts"] = prompt_state(checkpoint)
    if "advantages" in states:
        states["advantages"] = advantage_state(checkpoint, config)
    return states


def prompt_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the position in the data; earlier checkpoints counted batches instead of prompts."""
    state = dict(checkpoint.state["prompts"])
    if "prompts_taken" not in state:
        size = saved_config(checkpoint)["trainer"]["prompts_per_step"]
        state["prompts_taken"] = state["batches_taken"] * size
    return state


def advantage_state(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any]:
    """Return what the advantage controller continues with.

    What a change of the configuration is to replace is left out.
    """
    changed = {name for name, _, _ in _changes(saved_config(checkpoint), config)}
    return {
        name: value
        for name, value in checkpoint.state["advantages"].items()
        if not changed.intersection(ADAPTED.get(name, ()))
    }


def already_complete(checkpoint: Checkpoint, config: RunConfig, *, evaluates: bool) -> bool:
    """Return whether all steps are taken and, where the run `evaluates`, all evaluations made."""
    step, evaluated_step = checkpoint.step, checkpoint.state["evaluated_step"]
    missed = evaluates and config.trainer.evaluation_is_due(step, evaluated_step)
    return step >= config.trainer.steps and not missed
