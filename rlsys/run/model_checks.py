"""Checks that need the files of the model and its reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def check_model(config: RunConfig, model_directory: Path, reference_directory: Path) -> None:
    """Refuse models that the run cannot train, sample from or compare.

    Raises:
        ConfigError: an architecture that cannot be trained, attention heads that cannot be split,
            a reference with other tokens, a model without an end token, or too few positions for
            prompt and response.
    """
    model = _model_config(model_directory, "model.path", config.model.path)
    _check_architectures(config, model_directory, reference_directory)
    _check_heads(config, model)
    if reference_directory != model_directory:
        _check_vocabularies(config, model, reference_directory)
    _check_ends(config, model_directory)
    _check_positions(config, model_directory)


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


def _check_ends(config: RunConfig, model_directory: Path) -> None:
    tokenizer = load_tokenizer(model_directory, trust_remote_code=config.model.trust_remote_code)
    stop = stop_strings(config.data.template, config.generation.stop)
    if not stop and not end_token_ids(model_directory, tokenizer):
        raise ConfigError(
            f"model.path: neither the configuration nor the tokenizer of {config.model.path!r} "
            "names an end token, so every response would be truncated at generation.max_tokens. "
            "Put eos_token_id into its generation_config.json, or set generation.stop."
        )


def _check_architectures(
    config: RunConfig, model_directory: Path, reference_directory: Path
) -> None:
    longest = config.data.max_prompt_tokens + config.generation.max_tokens
    models = {"model.path": model_directory, "reference.path": reference_directory}
    for field, directory in models.items():
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
