"""Checks before a run continues from a checkpoint, and the state that it continues with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rlsys.config import ConfigError, CriticConfig, LoraConfig, PtxConfig, RootConfig
from rlsys.config.command_line import flat
from rlsys.config.engines import ENGINES
from rlsys.config.renamed_fields import translated
from rlsys.config.resume_rules import rule_of
from rlsys.run.checkpoints import Checkpoint

ENGINE_PACKAGES = (package for traits in ENGINES.values() for package in traits.packages)
LIBRARIES = ("torch", "transformers", "numpy", "ray", *ENGINE_PACKAGES)
ABSENT = "absent"

REWARD_MODEL_STATE = "reward_model"  # absent in a run whose rewards are functions only

# States of the advantage controller in a checkpoint, and the fields that reset them when changed.
ADAPTED = {
    "kl_coefficient": ("algorithm.kl.coefficient",),
    "entropy_temperature": ("algorithm.entropy.temperature",),
    "estimator": ("algorithm.advantage.name",),
}


def describe_origin(config: RootConfig) -> dict[str, Any]:
    """Return the configuration and the versions of the libraries, ready for JSON."""
    return {"config": config.model_dump(mode="json"), "versions": dict(_installed())}


def _installed() -> Iterator[tuple[str, str]]:
    for library in LIBRARIES:
        try:
            yield library, version(library)
        except PackageNotFoundError:
            continue


def saved_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the configuration of the run that wrote a checkpoint, under its present names."""
    saved = translated(checkpoint.state["config"])
    # Earlier versions of RL runs had no critic and no text; other kinds have none.
    off = {"critic": CriticConfig(), "ptx": PtxConfig()}
    absent = {name: section.model_dump(mode="json") for name, section in off.items()}
    if "model" in saved:
        lora = {"lora": LoraConfig().model_dump(mode="json")}
        saved = {**saved, "model": lora | saved["model"]}
    return absent | saved if "algorithm" in saved else saved


def check_resumable(checkpoint: Checkpoint, config: RootConfig) -> None:
    """Refuse to continue with changes that rlsys.config.resume_rules does not allow.

    Nor may the ranks of a model change whose backend is deepspeed.

    Raises:
        ConfigError: a line for each field, with both values, the reason and the remedy.
    """
    mistakes = []
    for name, before, after in _changes(saved_config(checkpoint), config):
        rule = rule_of(name)
        if rule.verdict != "refused" or ABSENT in (before, after):
            continue
        mistakes.append(
            f"{name}: {after!r}, but checkpoint {checkpoint.path} was written with {before!r}. "
            f"{rule.reason} Resume with --{name} {before}, or start a new run with --model.path "
            f"{checkpoint.path}."
        )
    mistakes += _other_ranks_of_deepspeed(checkpoint, config)
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _other_ranks_of_deepspeed(checkpoint: Checkpoint, config: RootConfig) -> Iterator[str]:
    """Yield the trained models whose optimizer state is that of another number of ranks."""
    saved, now = flat(saved_config(checkpoint)), flat(config.model_dump(mode="json"))

    def ranks(values: Mapping[str, Any], section: str) -> Any:
        return values.get(f"{section}.ranks") or values.get("policy.ranks")

    # The critic has the policy's backend, and its ranks where it has none of its own.
    sections = {"policy": "policy", "reward_model": "reward_model"}
    if now.get("critic.enabled"):
        sections["critic"] = "policy"
    for section, owner in sections.items():
        before, after = ranks(saved, section), ranks(now, section)
        if now.get(f"{owner}.backend") == "deepspeed" and before != after:
            yield (
                f"{section}.ranks: {after}, but checkpoint {checkpoint.path} was written by "
                f"{before} ranks, and {owner}.backend 'deepspeed' saves the optimizer state as it "
                f"is sharded. Resume with --{section}.ranks {before}, or start a new run with "
                f"--model.path {checkpoint.path}."
            )


def differences(checkpoint: Checkpoint, config: RootConfig) -> list[str]:
    """Return the changes since the checkpoint that may change the results.

    Each is a line such as "trainer.steps: 60 -> 80"; versions of libraries are included.
    """
    now, before = dict(_installed()), checkpoint.state["versions"]
    libraries = [
        f"{name}: {before.get(name, ABSENT)} -> {now.get(name, ABSENT)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return changes(saved_config(checkpoint), config) + libraries


def changes(saved: Mapping[str, Any], config: RootConfig) -> list[str]:
    """Return how `config` differs from a saved one (nested, or flat by dotted name), in lines."""
    return [
        f"{name}: {before} -> {after}"
        for name, before, after in _changes(saved, config)
        if rule_of(name).verdict != "silent"
    ]


def _changes(saved: Mapping[str, Any], config: RootConfig) -> Iterator[tuple[str, Any, Any]]:
    before, after = flat(saved), flat(config.model_dump(mode="json"))
    for name in sorted({*before, *after}):
        if before.get(name, ABSENT) != after.get(name, ABSENT):
            yield name, before.get(name, ABSENT), after.get(name, ABSENT)


def registered_states(
    checkpoint: Checkpoint, config: RootConfig, names: Iterable[str]
) -> dict[str, Any]:
    """Return the state in the checkpoint of each of the named parts of a run.

    States that an earlier version wrote are converted to the present format.

    Raises:
        ConfigError: the checkpoint holds no state of a part.
    """
    names = tuple(names)
    missing = [name for name in names if name not in {*checkpoint.state, REWARD_MODEL_STATE}]
    if missing == ["texts"]:
        raise ConfigError(
            f"ptx.coefficient: checkpoint {checkpoint.path} was written without training on text, "
            "so it holds no position in the texts. Resume with --ptx.coefficient 0, or start a new "
            f"run with --model.path {checkpoint.path}."
        )
    if missing:
        raise ConfigError(
            f"checkpoint {checkpoint.path} holds no state of {', '.join(missing)}: another kind of "
            f"run wrote it. Start a new run with --model.path {checkpoint.path}."
        )
    states = {name: checkpoint.state.get(name) for name in names}
    if "prompts" in states:
        states["prompts"] = prompt_state(checkpoint)
    if "advantages" in states:
        states["advantages"] = advantage_state(checkpoint, config)
    return states


def prompt_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the position in the data; earlier versions counted batches instead of prompts."""
    state = dict(checkpoint.state["prompts"])
    if "prompts_taken" not in state:
        size = saved_config(checkpoint)["trainer"]["prompts_per_step"]
        state["prompts_taken"] = state["batches_taken"] * size
    return state


def advantage_state(checkpoint: Checkpoint, config: RootConfig) -> dict[str, Any]:
    """Return the state of the advantage controller.

    Parts that a change of the configuration replaces are left out.
    """
    changed = {name for name, _, _ in _changes(saved_config(checkpoint), config)}
    return {
        name: value
        for name, value in checkpoint.state["advantages"].items()
        if not changed.intersection(ADAPTED.get(name, ()))
    }


def already_complete(checkpoint: Checkpoint, config: RootConfig, *, evaluates: bool) -> bool:
    """Return whether all steps and, if the run `evaluates`, all evaluations are done."""
    step, evaluated_step = checkpoint.step, checkpoint.state["evaluated_step"]
    missed = evaluates and config.trainer.evaluation_is_due(step, evaluated_step)
    return step >= config.trainer.steps and not missed
