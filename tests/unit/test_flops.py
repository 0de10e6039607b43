"""Operations counted by hand, and by torch's own counter on a real model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlsys.data.packing import SegmentGroup
from rlsys.models.flops import (
    PEAK_BFLOAT16,
    DecoderSize,
    forward_flops,
    generation_flops,
    model_flops_utilization,
    peak_bfloat16_flops,
    training_flops,
    visible_pairs,
)
from workers.training.packed_attention import group_mask

SIZE = DecoderSize(block_parameters=1000, head_parameters=50, layers=2, attention_width=8)


def test_visible_pairs_are_those_of_the_mask():
    assert visible_pairs(2, [1, 2]) == 13
    for prompt, responses in ((1, ()), (5, (3,)), (4, (2, 0, 7))):
        mask = group_mask(SegmentGroup(0, prompt, responses), torch.device("cpu"))
        assert visible_pairs(prompt, responses) == int(mask.sum())


def test_a_forward_pass_by_hand():
    # 2 * 1000 * 3 + 2 * 50 * 2 + 4 * 2 * 8 * 6 = 6000 + 200 + 384
    assert forward_flops(SIZE, tokens=3, predicted=2, pairs=6) == 6584


def test_training_is_six_times_parameters_and_tokens_and_the_attention():
    tokens, pairs = 10, visible_pairs(10)
    expected = 6 * SIZE.parameters * tokens + 12 * 2 * 8 * pairs
    assert training_flops(SIZE, tokens=tokens, predicted=tokens, pairs=pairs) == expected


def test_generation_is_the_forward_pass_of_all_tokens_but_the_last():
    # Token by token: the prompt of 3, whose last position predicts; then one token at a time.
    steps = [forward_flops(SIZE, tokens=3, predicted=1, pairs=6)]
    steps += [forward_flops(SIZE, tokens=1, predicted=1, pairs=context) for context in (4, 5, 6)]
    assert generation_flops(SIZE, prompt_length=3, lengths=[4]) == sum(steps)
    assert generation_flops(SIZE, prompt_length=3, lengths=[4, 4]) == 2 * sum(steps)


def test_utilization():
    assert model_flops_utilization(5e14, 2.0, 1e15) == 0.25


def test_products_are_those_that_torch_counts():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    size = DecoderSize(
        block_parameters=blocks, head_parameters=32 * 64, layers=3, attention_width=32
    )

    tokens = 12
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=torch.arange(tokens)[None], use_cache=False).logits.sum()
        forward = counter.get_total_flops()
        loss.backward()
    # The eager kernel computes all pairs, masked ones too.
    work = {"tokens": tokens, "predicted": tokens, "pairs": tokens * tokens}
    assert forward == forward_flops(size, **work)
    assert counter.get_total_flops() == training_flops(size, **work)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", None),  # another chip than the A10
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla T4", None),  # no bfloat16
    ],
)
def test_peaks_by_name(name: str, peak: float | None):
    assert peak_bfloat16_flops(name) == peak


def test_no_row_of_the_table_hides_a_later_one():
    for place, (words, _) in enumerate(PEAK_BFLOAT16):
        for earlier, _ in PEAK_BFLOAT16[:place]:
            assert not set(words).issuperset(earlier)
