"""Loading the parts of a resolved model directory.

transformers takes seconds to import, and some actors need only small parts of this module; so it is
imported inside of the functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config_error import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# The tables of transformers that answer for all types of models take as long to import as the
# models. These are rows of theirs, so that a driver, which loads no model, need not wait for them.
CAUSAL_LMS = frozenset({"gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"})
# Of these AutoTokenizer takes the saved class as it is, and config.json alone tells of windows.
PLAIN_TYPES = frozenset({"llama"})


class UnsupportedModelError(ConfigError):
    """A model that cannot be trained correctly, as detected when it was loaded or tried."""


def load_tokenizer(
    directory: Path | str, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory."""
    if _is_saved_as_backend(Path(directory)):
        from transformers import TokenizersBackend

        return TokenizersBackend.from_pretrained(directory)

    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def _is_saved_as_backend(directory: Path) -> bool:
    """Return whether the tokenizer is certainly one that tokenizer.json describes alone."""
    files = (directory / "config.json", directory / "tokenizer_config.json")
    if not all(file.is_file() for file in (*files, directory / "tokenizer.json")):
        return False
    try:
        model, tokenizer = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        return (
            model.get("model_type") in PLAIN_TYPES
            and tokenizer.get("tokenizer_class") == "TokenizersBackend"
            and "auto_map" not in {**model, **tokenizer}
        )
    except (ValueError, AttributeError):  # AutoTokenizer says what is wrong
        return False


def load_causal_lm(
    directory: Path | str, *, dtype: torch.dtype, attention: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the language model onto the CPU, in evaluation mode.

    Args:
        attention: a name that transformers or `AttentionInterface` knows. `sdpa` becomes `eager`
            for models that need it: torch's kernel would leave out their attention softcap or
            sinks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)

    def load(kernel: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=kernel, trust_remote_code=trust_remote_code
        )
        return model.eval()

    return load_with_attention(load, config, attention)


def load_with_attention(
    load: Callable[[str], PreTrainedModel], config: PretrainedConfig, attention: str
) -> PreTrainedModel:
    """Load a model with the kernel `attention`, or with `eager` where sdpa would be wrong.

    See `load_causal_lm`.
    """
    if attention == "sdpa" and needs_eager_attention(config):
        attention = "eager"
    try:
        return load(attention)
    except ValueError as error:
        # Some architectures have no SDPA attention. Every one has an eager attention.
        if attention != "sdpa" or "does not support an attention implementation" not in str(error):
            raise
        return load("eager")


def needs_eager_attention(config: PretrainedConfig) -> bool:
    """Return whether the model caps its attention logits, which SDPA attention leaves out."""
    text = config.get_text_config()
    return bool(getattr(text, "attn_logit_softcapping", None))


def check_architecture(
    directory: Path | str, *, field: str, longest: int, trust_remote_code: bool
) -> None:
    """Refuse a model that cannot be trained correctly, as far as its configuration shows.

    Args:
        field: the config field that names the model, for messages.
        longest: tokens of the longest sequence, prompt and response.

    Raises:
        ValueError: not a causal language model, remote code that is not allowed, quantized weights,
            or position encodings that change with the length of a sequence.
    """
    facts = json.loads((Path(directory) / "config.json").read_text())
    kind = facts.get("model_type")
    remote = "AutoModelForCausalLM" in facts.get("auto_map", {})
    local = _is_causal_lm(kind)
    if remote and not local and not trust_remote_code:
        raise ValueError(
            f"{field}: a model of type {kind!r} runs Python code that comes with it. Read the code "
            f"in {directory}, then set model.trust_remote_code true."
        )
    if not local and not remote:
        raise ValueError(
            f"{field}: transformers has no causal language model of type {kind!r}. Choose a "
            "decoder such as Llama, Qwen or Mistral."
        )
    if "quantization_config" in facts:
        method = facts["quantization_config"].get("quant_method", "an unknown method")
        raise ValueError(
            f"{field}: the weights are quantized ({method}), and quantized weights cannot be "
            "trained. Choose the model in float32 or bfloat16."
        )
    _check_rope(facts.get("text_config", facts), field=field, longest=longest)


def _is_causal_lm(kind: str | None) -> bool:
    """Return whether transformers has a causal language model of this type."""
    if kind in CAUSAL_LMS:
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _check_rope(facts: Mapping[str, Any], *, field: str, longest: int) -> None:
    """Refuse lengths at which the frequencies of RoPE depend on how long a sequence has become.

    The log-probability of a token would depend on the tokens after it. Engine and trainer see a
    sequence at different lengths, so they would never agree.
    """
    rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    for part in kinds:
        kind = part.get("rope_type", part.get("type"))
        if kind not in ("dynamic", "longrope"):
            continue
        limit = part.get("original_max_position_embeddings") or facts.get(
            "original_max_position_embeddings", facts.get("max_position_embeddings")
        )
        if limit is not None and longest > limit:
            raise ValueError(
                f"{field}: its RoPE ({kind}) changes the frequencies of sequences beyond {limit} "
                f"tokens, and data.max_prompt_tokens + generation.max_tokens is {longest}. Lower "
                f"them to {limit} in all, or choose another model."
            )


def end_token_ids(directory: Path | str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end a response; empty where none is named.

    These are the tokens of generation_config.json, else of config.json, and the tokenizer's own.

    Conventions: vLLM uses the tokenizer's and those of generation_config.json, `generate` of
    transformers the latter only. A chat model's tokenizer often names the end of a turn where its
    config names the end of a text: either ends a response here, in every engine.
    """
    named = _eos_of(Path(directory) / "generation_config.json")
    if not named:
        named = _eos_of(Path(directory) / "config.json")
    own = tokenizer.eos_token_id
    return named | ({own} if isinstance(own, int) else set())


def _eos_of(file: Path) -> frozenset[int]:
    """Return the `eos_token_id` of a JSON file or of its `text_config`: one, several, or none."""
    if not file.is_file():
        return frozenset()
    config = json.loads(file.read_text())
    value = config.get("eos_token_id")
    if value is None:
        value = (config.get("text_config") or {}).get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return frozenset(token for token in values if token is not None)


def context_length(directory: Path | str) -> int | None:
    """Return the longest sequence that the model's positions allow, in tokens.

    None: its config does not say.
    """
    config = json.loads((Path(directory) / "config.json").read_text())
    text = config.get("text_config", config)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")  # the last two: GPT-2, MPT
    return next((text[name] for name in names if text.get(name)), None)


def longest_window(directory: Path | str, *, trust_remote_code: bool = False) -> int | None:
    """Return the widest attention window of the model's layers, in tokens.

    None: no layer has a window.
    """
    names = ("sliding_window", "attention_chunk_size", "attention_window_size")
    facts = json.loads((Path(directory) / "config.json").read_text())
    if facts.get("model_type") in PLAIN_TYPES and "auto_map" not in facts:
        windows = [facts.get(name) for name in names]
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        windows = [getattr(config.get_text_config(), name, None) for name in names]
    return max((window for window in windows if isinstance(window, int)), default=None)


def mlp_shape(directory: Path | str) -> tuple[int, int]:
    """Return hidden and intermediate size, the shape of most of a model's matrix products.

    Defaults where config.json does not say: 512, and four times the hidden size.
    """
    config = json.loads((Path(directory) / "config.json").read_text())
    text = {**config, **(config.get("text_config") or {})}
    hidden_names = ("hidden_size", "n_embd", "d_model")
    hidden = next((text[name] for name in hidden_names if text.get(name)), 512)
    inner_names = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim")
    inner = next((text[name] for name in inner_names if text.get(name)), 4 * hidden)
    # Some models list the size of each layer.
    return _largest(hidden), _largest(inner)


def _largest(value: int | list[int]) -> int:
    return max(value) if isinstance(value, list) else value


def parameter_count(directory: Path | str) -> int:
    """Count the parameters by the shapes in the safetensors headers; no weights are read."""
    from safetensors import safe_open

    count = 0
    for file in Path(directory).glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors handle is not a dict)
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                count += size
    return count
