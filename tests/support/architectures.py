"""Tiny models of many architectures, with the features in which they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer, needs_eager_attention

# Every architecture takes the sizes that its configuration knows, by any of its names for them.
SIZES: Mapping[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 8}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model type of transformers with settings that switch on a feature."""

    model_type: str
    feature: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name for tables and test ids."""
        return f"{self.model_type}, {self.feature}" if self.feature else self.model_type


def _of(model_type: str, feature: str = "", **settings: Any) -> Architecture:
    return Architecture(model_type=model_type, feature=feature, settings=settings)


_DEEPSEEK = {
    "head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **EXPERTS,
}

# The families that must run packed.
PACKED: tuple[Architecture, ...] = (
    _of("llama"),
    _of("llama", "attention and MLP bias", attention_bias=True, mlp_bias=True),
    _of("mistral"),
    _of("mistral", "sliding window", **WINDOW),
    _of("mixtral", "sliding window, experts", **WINDOW, **EXPERTS),
    _of("qwen2"),
    _of("qwen2", "sliding window", use_sliding_window=True, max_window_layers=1, **WINDOW),
    _of("qwen2_moe", "experts", shared_expert_intermediate_size=32, **EXPERTS),
    _of("qwen3"),
    _of("qwen3_moe", "experts", **EXPERTS),
    _of("gemma"),
    _of("gemma2", "sliding window, softcaps", query_pre_attn_scalar=16, **WINDOW),
    _of("gemma3_text", "sliding window", query_pre_attn_scalar=16, **WINDOW),
    _of("phi3"),
    _of("phi3", "sliding window, dropout", resid_pdrop=0.1, embd_pdrop=0.1, **WINDOW),
    _of("olmo2"),
    _of("olmo3", "sliding window", **WINDOW),
    _of("smollm3"),
    _of("granite", "scales", logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.1),
    _of("starcoder2", "sliding window, dropout", residual_dropout=0.1, use_bias=True, **WINDOW),
    _of("deepseek_v2", "experts", **_DEEPSEEK),
    _of("deepseek_v3", "experts", **_DEEPSEEK),
    _of("glm"),
    _of("glm4"),
)

# Other families, chosen for features that are easy to get wrong.
OTHERS: tuple[Architecture, ...] = (
    _of("phi", "LM-head bias, dropout", resid_pdrop=0.1),
    _of("phimoe", "experts, jitter", router_jitter_noise=0.1, lm_head_bias=True, **EXPERTS),
    _of("cohere", "logit scale", logit_scale=0.25),
    _of("cohere2", "sliding window, logit scale", logit_scale=0.25, **WINDOW),
    _of("nanochat", "final softcap"),
    _of("exaone4", "sliding window", sliding_window_pattern=2, **WINDOW),
    _of("seed_oss", "dropout", residual_dropout=0.1, attention_dropout=0.1),
    _of("opt", "dropout", dropout=0.1, ffn_dim=96, word_embed_proj_dim=64),
    _of("gpt2", "dropout"),
    _of("gpt_neox", "dropout", hidden_dropout=0.1, attention_dropout=0.1),
    _of("gpt_neo", "local attention", attention_types=[[["global", "local"], 1]], window_size=8),
    _of("gptj", "LM-head bias", rotary_dim=8),
    _of("falcon"),
    _of("falcon", "ALiBi", alibi=True, new_decoder_architecture=False, multi_query=True),
    _of("bloom", "ALiBi"),
    _of("mpt", "ALiBi", d_model=64, n_heads=4, n_layers=2, max_seq_len=512),
    _of("stablelm"),
    _of("nemotron"),
    _of("gpt_oss", "sliding window, sinks, experts", **WINDOW, **EXPERTS),
    _of(
        "llama4_text",
        "chunked attention",
        attention_chunk_size=8,
        intermediate_size_mlp=96,
        **EXPERTS,
    ),
    _of("mamba", "recurrent state", state_size=8),
    _of("mamba2", "recurrent state", state_size=8, num_heads=8, n_groups=1, expand=2),
    _of("recurrent_gemma", "recurrent state", lru_width=64, attention_window_size=8),
    _of(
        "falcon_h1",
        "recurrent state",
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
    ),
    _of(
        "bamba",
        "recurrent state",
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=8,
        attn_layer_indices=[1],
    ),
    _of(
        "jamba",
        "recurrent state",
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        **EXPERTS,
    ),
    _of("lfm2", "convolution state", full_attn_idxs=[1]),
    _of(
        "qwen3_next",
        "linear attention",
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=32,
        **EXPERTS,
    ),
    _of("helium"),
    _of("ernie4_5"),
    _of("hunyuan_v1_dense"),
    _of("arcee"),
    _of("apertus"),
    _of("dots1", "experts", n_shared_experts=1, first_k_dense_replace=1, **EXPERTS),
    _of("glm4_moe", "experts", **_DEEPSEEK),
    _of("minimax", "linear attention", **EXPERTS),
    _of("persimmon"),
    _of("codegen", "LM-head bias", rotary_dim=8),
    _of("xglm", "", ffn_dim=96, attention_heads=4, num_layers=2),
    _of("biogpt", "dropout", hidden_dropout_prob=0.1),
    _of("gpt_bigcode", "multi-query"),
    _of("bert", "not causal"),
)
ARCHITECTURES = PACKED + OTHERS


def generic_architectures() -> tuple[Architecture, ...]:
    """Return all other causal language models of transformers, with their default features."""
    listed = {architecture.model_type for architecture in ARCHITECTURES}
    return tuple(_of(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in listed)


def tiny_config(architecture: Architecture, *, vocabulary: int = 300) -> PretrainedConfig:
    """Return the configuration of a model with about 0.1 M parameters."""
    kind = CONFIG_MAPPING[architecture.model_type]
    known = kind()
    names = {*known.to_dict(), *kind.attribute_map}

    settings = {name: value for name, value in SIZES.items() if name in names}
    settings["vocab_size"] = vocabulary
    return kind(**{**settings, **architecture.settings})


def tiny_parameters(architecture: Architecture) -> int:
    """Return how many parameters the model has, without allocating them.

    Some architectures have parts of fixed sizes, and are not tiny.
    """
    config = tiny_config(architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def tiny_model(
    architecture: Architecture, *, vocabulary: int = 300, seed: int = 0
) -> PreTrainedModel:
    """Return the model in float32 with weights so large that a wrong mask or scale shows."""
    config = tiny_config(architecture, vocabulary=vocabulary)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation="eager" if needs_eager_attention(config) else None,
    )

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))

        # Sharper logits, so that small differences in the body show.
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            head.weight.mul_(3.0)

    return model.eval()


def save_tiny_model(directory: Path, architecture: Architecture, *, seed: int = 0) -> None:
    """Write the model with the tokenizer of the catalogue's `tiny` model into `directory`."""
    tokenizer = load_tokenizer(resolve_model("tiny"))
    model = tiny_model(architecture, vocabulary=len(tokenizer), seed=seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
