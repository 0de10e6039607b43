"""Models and backends as the trainer builds them, from settings that need no pydantic."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlsys.models.flops import DecoderSize
from rlsys.models.tiny import build_tiny_model
from workers.training.backends.fsdp2 import FSDP2Backend, build
from workers.training.model_setup import decoder_blocks
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_model import PackedCausalLM
from workers.training.process_group import join_process_group, open_rendezvous

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOCAL = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, with the fields of `OptimizerConfig` that a backend reads."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Role:
    """A trained model, with the fields of `TrainableRoleConfig` that a backend reads."""

    compute_dtype: str
    optimizer: Optimizer
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with random weights and tied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    window: int | None = None  # tokens that a query sees, itself included; None: all before it
    seed: int = field(default=0)


# The shapes of SmolLM2-135M, Qwen2.5-0.5B and Qwen2.5-1.5B.
SMALL = Shape(hidden=576, intermediate=1536, layers=30, heads=9, key_heads=3, vocabulary=49152)
MEDIUM = Shape(hidden=896, intermediate=4864, layers=24, heads=14, key_heads=2, vocabulary=151936)
LARGE = Shape(hidden=1536, intermediate=8960, layers=28, heads=12, key_heads=2, vocabulary=151936)
TINY = Shape(hidden=64, intermediate=128, layers=2, heads=2, key_heads=1, vocabulary=512)


def random_model(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a model with random weights, in evaluation mode; equal seeds give equal weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

    options = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.hidden // shape.heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if shape.window is None:
        config = LlamaConfig(**options)
    else:
        config = MistralConfig(**options, sliding_window=shape.window)

    torch.manual_seed(shape.seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def packed(model: PreTrainedModel, kernel: str, *, chunk_tokens: int = 1024) -> PackedCausalLM:
    """Return the model with the packed forward pass of an attention kernel."""
    model.set_attn_implementation(register_packed_attention(kernel))
    return PackedCausalLM(model, chunk_tokens=chunk_tokens)


def join() -> torch.device:
    """Join a process group of one rank and return its device."""
    store = open_rendezvous(LOCAL, 1)
    return join_process_group(f"{LOCAL}:{store.port}", 0, 1, store)


def backend_of(
    module: PackedCausalLM, role: Role, device: torch.device, directory: Path
) -> FSDP2Backend:
    """Shard a model with FSDP2; join the process group before."""
    return build(module, role, device, directory)


def decoder_size(model: PreTrainedModel) -> DecoderSize:
    """Return the numbers on which the operations of a model depend; before it is sharded."""
    config = model.config.get_text_config()
    products = [
        module.weight.numel()
        for block in decoder_blocks(model)
        for module in block.modules()
        if isinstance(module, nn.Linear)
    ]
    return DecoderSize(
        block_parameters=sum(products),
        head_parameters=config.hidden_size * config.vocab_size,
        layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * config.head_dim,
    )


def save_random_model(shape: Shape, directory: Path, device: torch.device) -> None:
    """Write a random model in bfloat16 into `directory`, with the tokenizer of the tiny model."""
    build_tiny_model(directory)
    random_model(shape, device, torch.bfloat16).save_pretrained(directory)
