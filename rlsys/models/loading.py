"""Loading the parts of a resolved model directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory."""
    return AutoTokenizer.from_pretrained(directory)


def load_causal_lm(
    directory: Path | str, *, dtype: torch.dtype, attention: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The language model, on the CPU, with `attention` a name that transformers or `AttentionInterface` knows."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
    )


def context_length(directory: Path | str) -> int | None:
    """The longest sequence that the model's positions allow, in tokens; None where its config does not say."""
    config = json.loads((Path(directory) / "config.json").read_text())
    return config.get("max_position_embeddings")


def parameter_count(directory: Path | str) -> int:
    """Parameters by the shapes in the safetensors headers; no weights are read."""
    from safetensors import safe_open

    count = 0
    for file in Path(directory).glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors handle is no dict)
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                count += size
    return count
