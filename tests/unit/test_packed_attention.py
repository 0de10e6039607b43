"""A packed forward pass gives each response the result of its own forward pass."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlsys.data.batches import RolloutBatch
from rlsys.data.packing import pack_rows
from tests.support.rollout_examples import random_rollouts, rollouts
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_model import PackedCausalLM, PackTensors

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def model_of(family: str, kernel: str) -> PreTrainedModel:
    """Return a small random model of `family`."""
    torch.manual_seed(0)
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SMALL))
    elif family == "qwen2":
        settings = {name: value for name, value in SMALL.items() if name != "head_dim"}
        model = Qwen2ForCausalLM(Qwen2Config(**settings))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL))

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # far from uniform, so that a wrong mask shows
    model.set_attn_implementation(kernel)
    return model.eval()


def packed_logprobs(
    model: PreTrainedModel, batch: RolloutBatch, *, budget: int, share_prefix: bool
) -> torch.Tensor:
    """Return the log-probabilities of packed passes, [N], 0 outside the mask."""
    packed = PackedCausalLM(model, chunk_tokens=5)
    packs = pack_rows(
        batch.sequences,
        np.arange(len(batch)),
        budget=budget,
        rank=0,
        ranks=1,
        shared_prefix_packing=share_prefix,
    )

    flat = torch.zeros(len(batch.token_ids))
    for pack in packs:
        result = packed(PackTensors.of(pack, torch.device("cpu")))
        flat[torch.from_numpy(pack.flat_positions)] = result.logprobs
    return flat


def single_logprobs(model: PreTrainedModel, batch: RolloutBatch) -> torch.Tensor:
    """Return the log-probabilities of slow passes: one sequence, all logits, an explicit shift."""
    flat = torch.zeros(len(batch.token_ids))
    for start, end in zip(batch.sequence_offsets[:-1], batch.sequence_offsets[1:], strict=True):
        tokens = torch.from_numpy(batch.token_ids[start:end].astype(np.int64))[None]
        logs = model(input_ids=tokens).logits[0].log_softmax(-1)
        for t in range(1, end - start):
            if batch.response_mask[start + t]:
                flat[start + t] = logs[t - 1, tokens[0, t]]
    return flat


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()
def test_packed_equals_single(family: str, kernel: str):
    batch = random_rollouts(0)
    reference = single_logprobs(model_of(family, "eager"), batch)
    packed_model = model_of(family, register_packed_attention(kernel))
    for budget, share_prefix in [(1000, True), (30, True), (1000, False), (20, False), (1, True)]:
        found = packed_logprobs(packed_model, batch, budget=budget, share_prefix=share_prefix)
        assert torch.allclose(found, reference, atol=1e-5), (budget, share_prefix)


def test_one_response_does_not_reach_another():
    model = model_of("llama", register_packed_attention("sdpa"))
    one = rollouts([([7, 8, 9], [[20, 21, 22], [30, 31]]), ([5], [[40]])])
    other = rollouts([([7, 8, 9], [[20, 21, 22], [99, 98]]), ([6], [[41]])])

    first = packed_logprobs(model, one, budget=1000, share_prefix=True)
    second = packed_logprobs(model, other, budget=1000, share_prefix=True)
    assert torch.equal(first[:6], second[:6])  # the unchanged response
    assert not torch.equal(first[9:11], second[9:11])  # the changed one


def test_gradient_of_shared_prompts_equals_that_of_repeated_ones():
    batch = random_rollouts(4)
    gradients = []
    for share_prefix in (True, False):
        model = model_of("llama", register_packed_attention("sdpa"))
        logprobs = packed_logprobs(model, batch, budget=40, share_prefix=share_prefix)
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
