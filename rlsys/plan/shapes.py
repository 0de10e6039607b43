"""The sizes of a model that its memory depends on, from config.json or from flags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.config.errors import ConfigError
from rlsys.models.catalogue import HUB_NAMES, cache_directory

# Decoders whose blocks are those of Llama: RMS norms before attention and MLP, rotary positions,
# a gated MLP. The formulas count the tensors of these blocks, and of no others.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
QKV_BIAS = frozenset({"qwen2"})
QK_NORM = frozenset({"qwen3"})


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense decoder of Llama's kind.

    Raises:
        ValueError: a size is not positive, or kv_heads does not divide heads.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head_dim: int
    tied: bool = False  # one matrix is embedding and LM head
    qkv_bias: bool = False
    qk_norm: bool = False  # RMS norms of queries and keys, over head_dim
    file_bytes: int = 2  # of a number in the model's files; published models have bfloat16

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0. Give a size.")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: {self.kv_heads} does not divide the {self.heads} heads, which share "
                "them in groups of one size. Give a divisor."
            )

    @property
    def query_width(self) -> int:
        """Width of all query heads of a token."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads of a token; that of the value heads is the same."""
        return self.kv_heads * self.head_dim

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one of the three matrices of a block's MLP."""
        return self.hidden * self.intermediate

    @property
    def block_parameters(self) -> int:
        """Parameters of one decoder block: projections, MLP and norms."""
        attention = 2 * self.hidden * (self.query_width + self.key_width)
        if self.qkv_bias:
            attention += self.query_width + 2 * self.key_width
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + 3 * self.mlp_parameters + norms

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, as many as those of an LM head."""
        return self.vocabulary * self.hidden

    def root_parameters(self, *, value_head: bool = False) -> int:
        """Return the parameters outside of the blocks: embedding, last norm and head."""
        own_head = 0 if self.tied else self.embedding_parameters
        head = self.hidden if value_head else own_head
        return self.embedding_parameters + self.hidden + head

    def parameters(self, *, value_head: bool = False) -> int:
        """Return all parameters; a tied matrix counts once."""
        return self.layers * self.block_parameters + self.root_parameters(value_head=value_head)


SIZES = ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocabulary", "head_dim")

# Sizes by name, from the config.json of published models.
NAMED_SHAPES: Mapping[str, ModelShape] = {
    # Qwen/Qwen2.5-1.5B
    "1.5b": ModelShape(
        hidden=1536,
        layers=28,
        heads=12,
        kv_heads=2,
        intermediate=8960,
        vocabulary=151936,
        head_dim=128,
        tied=True,
        qkv_bias=True,
    ),
    # Qwen/Qwen2.5-7B
    "7b": ModelShape(
        hidden=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        intermediate=18944,
        vocabulary=152064,
        head_dim=128,
        qkv_bias=True,
    ),
    # Qwen/Qwen2.5-32B
    "32b": ModelShape(
        hidden=5120,
        layers=64,
        heads=40,
        kv_heads=8,
        intermediate=27648,
        vocabulary=152064,
        head_dim=128,
        qkv_bias=True,
    ),
    # meta-llama/Llama-3.3-70B-Instruct
    "70b": ModelShape(
        hidden=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        intermediate=28672,
        vocabulary=128256,
        head_dim=128,
    ),
}


def shape_of_flags(values: Mapping[str, int | None], *, tied: bool) -> ModelShape:
    """Return the shape that flags give; head_dim and kv_heads follow from the others by default.

    Raises:
        ConfigError: a size is missing or impossible.
    """
    given = {name: value for name, value in values.items() if value is not None}
    needed = [name for name in SIZES if name not in ("head_dim", "kv_heads")]
    missing = [f"--{name.replace('_', '-')}" for name in needed if name not in given]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: a shape needs this too. Give every size, or name a model."
        )
    return _checked(given, tied=tied, source="the flags")


def shape_of_model(path: str) -> ModelShape:
    """Return the shape of a model that is on this machine; nothing is fetched.

    Args:
        path: a value of `model.path` whose files are in a cache, a directory, or a config.json.

    Raises:
        ConfigError: there is no config.json, or it is that of a model that the formulas do not
            cover.
    """
    file = _config_of(path)
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {str(file)!r} is no readable JSON ({error}).") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"model.path: {str(file)!r} holds no configuration of a model.")
    return shape_of_config(facts, source=str(file))


def _config_of(path: str) -> Path:
    local = Path(path).expanduser()
    if local.is_file() and local.suffix == ".json":
        return local
    for directory in (local, cache_directory() / path):
        if (directory / "config.json").is_file():
            return directory / "config.json"
    if local.is_dir():
        raise ConfigError(f"model.path: {path!r} has no config.json. Give a model's directory.")

    name = HUB_NAMES.get(path, path)
    if name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return Path(found)
    raise ConfigError(
        f"model.path: no config.json of {path!r} is on this machine, and the plan fetches nothing. "
        f"Give a directory, a config.json, --size {' or '.join(NAMED_SHAPES)}, or the sizes by "
        "--hidden, --layers, --heads, --kv-heads, --intermediate, --vocabulary."
    )


def shape_of_config(facts: Mapping[str, Any], *, source: str) -> ModelShape:
    """Return the shape that the values of a config.json describe.

    Raises:
        ConfigError: another architecture than those of `LLAMA_LIKE`, or a missing size.
    """
    kind = facts.get("model_type")
    if kind not in LLAMA_LIKE:
        raise ConfigError(
            f"model.path: {source} is of type {kind!r}, and the formulas are those of "
            f"{', '.join(LLAMA_LIKE)}. For a rough figure give the sizes of a similar model by "
            "flags."
        )
    if facts.get("mlp_bias") or (facts.get("attention_bias") and kind != "qwen2"):
        raise ConfigError(
            f"model.path: {source} has biases in its projections, which the formulas leave out. "
            "Give its sizes by flags."
        )

    names = {
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "intermediate": "intermediate_size",
        "vocabulary": "vocab_size",
        "head_dim": "head_dim",
    }
    values: dict[str, int] = {}
    for name, key in names.items():
        value = facts.get(key)
        if value is None and name in ("kv_heads", "head_dim"):
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"model.path: {source} has no number {key}: {value!r}.")
        values[name] = value
    return _checked(
        values,
        tied=bool(facts.get("tie_word_embeddings", False)),
        source=source,
        qkv_bias=kind in QKV_BIAS,
        qk_norm=kind in QK_NORM,
        file_bytes=4 if facts.get("dtype", facts.get("torch_dtype")) == "float32" else 2,
    )


def _checked(values: Mapping[str, int], *, tied: bool, source: str, **kind: Any) -> ModelShape:
    heads, hidden = values["heads"], values["hidden"]
    defaults: dict[str, int] = {"kv_heads": heads}
    if "head_dim" not in values:
        if heads < 1 or hidden % heads:
            raise ConfigError(
                f"heads: {heads} does not divide the hidden size {hidden} of {source}. Give "
                "--head-dim, or a divisor."
            )
        defaults["head_dim"] = hidden // heads
    try:
        return ModelShape(**(defaults | dict(values)), tied=tied, **kind)
    except ValueError as error:
        raise ConfigError(f"{error} (from {source})") from error
