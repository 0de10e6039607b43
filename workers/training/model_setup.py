"""Load a model and prepare it for sharding by any backend.

load -> compare the packed forward pass with the model's own -> register the attention kernel
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlsys.config import ModelRoleConfig, RunConfig, TrainableRoleConfig
from rlsys.models.loading import load_causal_lm
from workers.training.forward_check import ForwardCheck, Lengths, check_forward
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_model import PackedCausalLM
from workers.training.process_group import agreed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Kernels of the model's own forward pass where they are not the configured ones: transformers
# compiles flex_attention anew for each shape.
OWN_KERNEL = {"flex_attention": "sdpa"}


def choose_kernel(configured: str, device: torch.device) -> str:
    """Return the attention kernel that `model.attention` means on this device."""
    if configured != "auto":
        return configured
    if device.type != "cuda":
        return "sdpa"

    try:
        import flash_attn  # noqa: F401  # pyright: ignore[reportMissingImports]  (GPU extra)
    except ImportError:
        return "sdpa"
    return "flash_attention_2"


def prepare_model(
    config: RunConfig, settings: ModelRoleConfig, directory: Path, device: torch.device
) -> tuple[PackedCausalLM, ForwardCheck]:
    """Load a model and find out which forward pass it can run; collective.

    A trainable model has float32 weights (the masters); a frozen one is stored in the compute
    dtype. Both run in evaluation mode: dropout and router jitter would make the log-probabilities
    of one policy differ from pass to pass.

    Raises:
        UnsupportedModelError: no forward pass gives the right log-probabilities.
    """
    trainable = isinstance(settings, TrainableRoleConfig)
    stored = torch.float32 if trainable else DTYPES[settings.compute_dtype]

    kernel = choose_kernel(config.model.attention, device)
    model = load_causal_lm(
        directory,
        dtype=stored,
        attention=OWN_KERNEL.get(kernel, kernel),
        trust_remote_code=config.model.trust_remote_code,
    )
    model.requires_grad_(trainable)
    nn.Module.to(model, device)

    verdict = agreed(lambda: _check(config, settings, model, kernel, device, directory))
    # Sharding needs a single dtype, and some models keep a few parameters in float32 regardless of
    # the dtype they are loaded with.
    nn.Module.to(model, stored)
    if verdict.packing:
        model.set_attn_implementation(register_packed_attention(kernel))

    packed = PackedCausalLM(
        model, chunk_tokens=settings.logit_chunk_tokens, packing=verdict.packing
    )
    return packed, verdict


def _check(
    config: RunConfig,
    settings: ModelRoleConfig,
    model: PreTrainedModel,
    kernel: str,
    device: torch.device,
    directory: Path,
) -> ForwardCheck:
    """Run `check_forward` on the model in float32."""
    # In bfloat16 rounding would hide the difference that a missing feature makes.
    nn.Module.to(model, torch.float32)
    return check_forward(
        model,
        kernel=kernel,
        lengths=Lengths(
            prompt=config.data.max_prompt_tokens, response=config.generation.max_tokens
        ),
        packing=settings.packing,
        device=device,
        code=directory,
    )


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks of the model, the units of sharding and recomputation.

    They are the members of module lists whose class the model names as not to be split. Inner
    blocks come before the blocks that contain them.
    """
    names = set(model._no_split_modules or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [block for blocks in lists for block in blocks if type(block).__name__ in names]

    # `modules()` visits outer modules first; `fromkeys` drops a block that stands in two lists.
    return list(dict.fromkeys(reversed(found)))


def recompute_in_backward(block: nn.Module) -> None:
    """Keep only the block's inputs in the forward pass, and recompute it in the backward pass.

    transformers' own switch works in training mode only, which would bring dropout with it.
    """
    forward = block.forward

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = recomputed
