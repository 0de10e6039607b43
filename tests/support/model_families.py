"""One tiny random model of each family of language models.

The features peculiar to the family are switched on: windows, softcaps, biases, experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from rlsys.models import resolve_model
from rlsys.models.loading import load_causal_lm, load_tokenizer

WINDOW = 16
DENSE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
WITHOUT_HEAD_DIM = {name: value for name, value in DENSE.items() if name != "head_dim"}
KV_HEADS = "num_key_value_heads"  # vLLM would trust it in a model that has no such thing
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **WITHOUT_HEAD_DIM,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 512,  # with the next, the only sizes for which vLLM has a kernel
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
TWO_KINDS = ["sliding_attention", "full_attention"]
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}

# Model type -> keywords of its config class. A name may carry a variant after a slash.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "attention_bias": True, "mlp_bias": True},
    "mistral": {**DENSE, "sliding_window": WINDOW},
    "mixtral": {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**WITHOUT_HEAD_DIM, "tie_word_embeddings": True},
    "qwen2/window": {
        **WITHOUT_HEAD_DIM,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen2_moe": {
        **WITHOUT_HEAD_DIM,
        **EXPERTS,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "qwen3": DENSE,
    "qwen3_moe": {**DENSE, **EXPERTS, "norm_topk_prob": True},
    "gemma": DENSE,
    "gemma2": {
        **DENSE,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        **DENSE,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 32,
        "layer_types": TWO_KINDS,
    },
    "phi": WITHOUT_HEAD_DIM | {"num_key_value_heads": 2},
    "phi3": {**WITHOUT_HEAD_DIM, "sliding_window": WINDOW},
    "phimoe": {**WITHOUT_HEAD_DIM, "num_local_experts": 4, "sliding_window": None},
    "olmo": {**WITHOUT_HEAD_DIM, "clip_qkv": 2.0},
    "olmo2": WITHOUT_HEAD_DIM,
    "olmo3": {**WITHOUT_HEAD_DIM, "sliding_window": WINDOW, "layer_types": TWO_KINDS},
    "olmoe": {**WITHOUT_HEAD_DIM, "num_experts": 4, "num_experts_per_tok": 2},
    "smollm3": {**WITHOUT_HEAD_DIM, "no_rope_layers": [1, 0]},
    "granite": {
        **WITHOUT_HEAD_DIM,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "granitemoe": {
        **WITHOUT_HEAD_DIM,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "logits_scaling": 4.0,
    },
    "starcoder2": {**WITHOUT_HEAD_DIM, "sliding_window": WINDOW},
    "glm": DENSE,
    "glm4": DENSE,
    "glm4_moe": {**LATENT, "head_dim": 32},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**LATENT, "q_lora_rank": 32, "topk_method": "noaux_tc"},
    "gpt_neox": {name: DENSE[name] for name in DENSE if name not in ("head_dim", KV_HEADS)},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 16},
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 512,
    },
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 2},
    "falcon": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "new_decoder_architecture": True,
        "num_kv_heads": 1,
    },
    "stablelm": WITHOUT_HEAD_DIM,
    "nemotron": WITHOUT_HEAD_DIM,
    "cohere": {**WITHOUT_HEAD_DIM, "logit_scale": 0.5},
    "cohere2": {**DENSE, "sliding_window": WINDOW, "layer_types": TWO_KINDS, "logit_scale": 0.5},
    "exaone4": {**WITHOUT_HEAD_DIM, "sliding_window": WINDOW, "layer_types": TWO_KINDS},
    "seed_oss": {**DENSE, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "gpt_oss": {
        **DENSE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
    },
    "ernie4_5": DENSE,
    "apertus": WITHOUT_HEAD_DIM,
    "arcee": DENSE,
    "helium": DENSE,
    "lfm2": {
        **WITHOUT_HEAD_DIM,
        "layer_types": ["conv", "full_attention"],
        "full_attn_idxs": [1],
        "conv_dim": 64,
    },
}


def build_family(name: str, directory: Path) -> None:
    """Write a model of family `name`, weights from seed 1, with its tokenizer to `directory`."""
    tokenizer = load_tokenizer(resolve_model("tiny"))
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = {"vocab_size": len(tokenizer), **special, **FAMILIES[name]}
    config = CONFIG_MAPPING[name.split("/")[0]](**settings)

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed=1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load_family(directory: Path, *, seed: int) -> PreTrainedModel:
    """Load the model of `directory` with its own forward pass and new weights of that seed."""
    model = load_causal_lm(directory, dtype=torch.float32, attention="eager").eval()
    randomize(model, seed=seed)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, *, seed: int) -> None:
    """Give every parameter values that matter to the logits.

    Matrices keep the scale of their input; vectors move away from 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            initial = (parameter.mean() > 0.5).float()  # 1 for the scale of a norm, 0 for a bias
            parameter.copy_(initial + 0.2 * noise)
