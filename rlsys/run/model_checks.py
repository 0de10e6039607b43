"""Checks that need the files of the model, its reference, its critic and its reward model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.config import ConfigError, RunConfig
from rlsys.config.engines import ENGINES
from rlsys.data.prompt_templates import stop_strings
from rlsys.models.loading import (
    check_architecture,
    context_length,
    end_token_ids,
    load_tokenizer,
)
from rlsys.models.value_models import (
    check_has_lm_head,
    check_process_reward_head,
    check_reward_head,
    value_layout,
)
from rlsys.rewards import reward_model_of
from rlsys.rewards.learned import PATH_FIELD, longest_scored, scores_steps


@dataclass(frozen=True, kw_only=True)
class ModelDirectories:
    """The models of a run, each the directory of the policy where no other is configured."""

    policy: Path
    reference: Path
    critic: Path
    reward_model: Path | None = None  # None: no reward is a model

    @staticmethod
    def same(directory: Path) -> ModelDirectories:
        """Return the directories of a run with one model."""
        return ModelDirectories(policy=directory, reference=directory, critic=directory)


def check_model(
    config: RunConfig, directories: ModelDirectories, *, trains_values: bool = False
) -> None:
    """Refuse models that the run cannot train, sample from or compare.

    Args:
        trains_values: the model that is trained gets a head for values; there is no policy.

    Raises:
        ConfigError: an architecture that cannot be trained, attention heads that cannot be split,
            a policy or a reference without a head for tokens, a reference, a critic or a reward
            model with other tokens, a critic that can have no value head, a reward model without
            one, a model without an end token, or too few positions for prompt and response.
    """
    model = _model_config(directories.policy, "model.path", config.model.path)
    _check_architectures(config, directories)
    if not trains_values:
        _check_lm_heads(config, directories)
    _check_heads(config, model)
    if directories.reference != directories.policy:
        _check_vocabularies(config, model, directories.reference)
    if config.critic.enabled:
        _check_critic(config, model, directories)
    if directories.reward_model is not None:
        _check_reward_model(config, model, directories.policy, directories.reward_model)
    _check_ends(config, directories.policy)
    _check_positions(config, directories.policy)


def _check_lm_heads(config: RunConfig, directories: ModelDirectories) -> None:
    """Refuse a policy or a reference that has a head for values instead of one for tokens."""
    models = {"model.path": (config.model.path, directories.policy)}
    if config.reference.path:
        models["reference.path"] = (config.reference.path, directories.reference)
    for field, (path, directory) in models.items():
        try:
            check_has_lm_head(directory)
        except ValueError as error:
            raise ConfigError(f"{field}: {path!r}: {error}") from error


def _check_critic(
    config: RunConfig, model: Mapping[str, Any], directories: ModelDirectories
) -> None:
    """Refuse a critic that has no head, or that reads the tokens of the policy as others."""
    path = config.critic.path or config.model.path
    try:
        value_layout(directories.critic)
    except ValueError as error:
        raise ConfigError(f"critic.path: {path!r}: {error}") from error
    if directories.critic == directories.policy:
        return

    critic = _Reader(name="critic", field="critic.path", path=path, directory=directories.critic)
    _check_same_tokens(config, model, directories.policy, critic)
    _check_room(config, critic)


def _check_reward_model(
    config: RunConfig, model: Mapping[str, Any], policy: Path, directory: Path
) -> None:
    """Refuse a reward model whose scores of the policy's responses would mean nothing."""
    function = reward_model_of(config.reward.functions)
    assert function is not None, "a directory without a reward that is a model"
    path, trust = function.parameters["path"], config.model.trust_remote_code
    of_steps = scores_steps(config)
    try:
        if of_steps:
            check_process_reward_head(directory)
        else:
            check_reward_head(directory)
    except ValueError as error:
        raise ConfigError(f"{PATH_FIELD}: {path!r}: {error}") from error

    reader = _Reader(name="reward model", field=PATH_FIELD, path=path, directory=directory)
    _check_same_tokens(config, model, policy, reader)
    ends = end_token_ids(directory, load_tokenizer(directory, trust_remote_code=trust))
    if not ends and not of_steps:
        raise ConfigError(
            f"{PATH_FIELD}: neither the configuration nor the tokenizer of {path!r} names an end "
            "token, at which a response is scored. Put eos_token_id into its config.json."
        )

    _check_room(config, reader, adds_end_token=not of_steps)


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """A model that reads the token ids of the policy."""

    name: str
    field: str
    path: str
    directory: Path


def _check_room(config: RunConfig, reader: _Reader, *, adds_end_token: bool = False) -> None:
    """Refuse a model whose positions are too few for prompt and response."""
    prompt, response = config.data.max_prompt_tokens, config.generation.max_tokens
    limit = context_length(reader.directory)
    if limit is not None and prompt + response + adds_end_token > limit:
        end = " + 1 for an end token" if adds_end_token else ""
        raise ConfigError(
            f"{reader.field}: data.max_prompt_tokens {prompt} + generation.max_tokens {response}"
            f"{end} exceed the {limit} positions of {reader.path!r}. Lower one of them."
        )


def _check_same_tokens(
    config: RunConfig, model: Mapping[str, Any], policy: Path, reader: _Reader
) -> None:
    """Refuse a model that reads the tokens of the policy as others."""
    field, path = reader.field, reader.path
    facts = _model_config(reader.directory, field, path)
    own, needed = facts.get("vocab_size"), model.get("vocab_size")
    if isinstance(own, int) and isinstance(needed, int) and own < needed:
        raise ConfigError(
            f"{field}: {path!r} has embeddings for {own} tokens and model.path "
            f"{config.model.path!r} for {needed}. Give a model with the same tokenizer."
        )

    trust = config.model.trust_remote_code
    tokens = load_tokenizer(policy, trust_remote_code=trust).get_vocab()
    try:
        others = load_tokenizer(reader.directory, trust_remote_code=trust).get_vocab()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field}: {path!r} has no tokenizer to compare with that of model.path "
            f"({' '.join(str(error).split())[:120]}). Copy the files of its tokenizer there."
        ) from error

    differing = next((token for token, i in tokens.items() if others.get(token) != i), None)
    if differing is not None:
        raise ConfigError(
            f"{field}: the tokenizer of {path!r} differs from that of model.path "
            f"{config.model.path!r}: token {differing!r} is {others.get(differing, 'absent')} "
            f"there and {tokens[differing]} here, and the {reader.name} reads the policy's token "
            "ids. Give a model with the same tokenizer."
        )


def _check_vocabularies(
    config: RunConfig, model: Mapping[str, Any], reference_directory: Path
) -> None:
    path = config.reference.path
    if not path:
        return
    reference = _model_config(reference_directory, "reference.path", path)
    if reference.get("vocab_size") != model.get("vocab_size"):
        raise ConfigError(
            f"reference.path: {path!r} has {reference.get('vocab_size')} tokens and model.path "
            f"{config.model.path!r} has {model.get('vocab_size')}, so they cannot be compared "
            "token by token. Give a model with the same tokenizer."
        )


def _check_positions(config: RunConfig, model_directory: Path) -> None:
    prompt, response = config.data.max_prompt_tokens, config.generation.max_tokens
    longest = config.generation.max_model_tokens or prompt + response
    limit = context_length(model_directory)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"generation.max_tokens: data.max_prompt_tokens {prompt} + generation.max_tokens "
            f"{response} exceed the model's {limit} positions. Lower one of them."
        )
    if limit is not None and config.longest_text > limit:
        raise ConfigError(
            f"ptx.max_tokens: {config.ptx.max_tokens} and the token before them exceed the model's "
            f"{limit} positions. Set it to at most {limit - 1}."
        )


def _check_ends(config: RunConfig, model_directory: Path) -> None:
    tokenizer = load_tokenizer(model_directory, trust_remote_code=config.model.trust_remote_code)
    stop = stop_strings(config.data.template, config.generation.stop)
    if not stop and not end_token_ids(model_directory, tokenizer):
        raise ConfigError(
            f"model.path: neither the configuration nor the tokenizer of {config.model.path!r} "
            "names an end token, so every response would be truncated at generation.max_tokens. "
            "Put eos_token_id into its generation_config.json, or set generation.stop."
        )


def _check_architectures(config: RunConfig, directories: ModelDirectories) -> None:
    sampled = config.data.max_prompt_tokens + config.generation.max_tokens
    models = {
        "model.path": (directories.policy, max(sampled, config.longest_text)),
        "reference.path": (directories.reference, sampled),
        "critic.path": (directories.critic, sampled),
    }
    if directories.reward_model is not None:
        models[PATH_FIELD] = (directories.reward_model, longest_scored(config))
    for field, (directory, longest) in models.items():
        try:
            check_architecture(
                directory,
                field=field,
                longest=longest,
                trust_remote_code=config.model.trust_remote_code,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _model_config(directory: Path, field: str, path: str) -> dict[str, Any]:
    """Return config.json of a model directory, with the fields of its language model on top."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field}: config.json of {path!r} cannot be read ({' '.join(str(error).split())}). "
            "Save the model again."
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{field}: config.json of {path!r} holds a {type(config).__name__}, not fields. Save "
            "the model again."
        )
    return {**config, **(config.get("text_config") or {})}


def _check_heads(config: RunConfig, model: Mapping[str, Any]) -> None:
    heads, parts = model.get("num_attention_heads"), config.generation.tensor_parallel
    splits = "tensor_parallel" in ENGINES[config.generation.engine].options
    if splits and isinstance(heads, int) and heads % parts:
        raise ConfigError(
            f"generation.tensor_parallel: {parts} does not divide the {heads} attention heads of "
            f"{config.model.path!r}. Choose a divisor."
        )
