"""Attention in two merged parts equals the masked softmax over all keys, in value and gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rlsys.data.packing import SegmentGroup
from workers.training.packed_attention import PackedLayout, group_mask
from workers.training.shared_prefix_attention import merge_into, shared_prefix_attention

HEADS, KEY_HEADS, WIDTH = 6, 2, 8
SCALING = 0.3

# Prompt length and response lengths of each group.
LAYOUTS = {
    "one call per group": [(9, (2, 1)), (4, (3,))],
    "prompt and responses apart": [(7, (11, 0, 5, 13)), (1, (17, 20))],
    "both": [(3, (1,)), (5, (30, 30, 30)), (40, (2, 2))],
    "no response has a token": [(6, (0, 0))],
}


def groups_of(layout: str) -> list[SegmentGroup]:
    """Return the groups, one behind the other."""
    lengths = [prompt + sum(responses) for prompt, responses in LAYOUTS[layout]]
    starts = [0, *itertools.accumulate(lengths)]
    return [
        SegmentGroup(start, prompt, responses)
        for start, (prompt, responses) in zip(starts, LAYOUTS[layout], strict=False)
    ]


def states(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return random query, key and value."""
    generator = torch.Generator().manual_seed(tokens)
    return tuple(
        torch.randn(1, heads, tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )  # pyright: ignore[reportReturnType]


def reference(query: Tensor, key: Tensor, value: Tensor, groups: list[SegmentGroup]) -> Tensor:
    """Return [1, n, h, d] by a softmax over the visible keys, in float64."""
    times = HEADS // KEY_HEADS
    q = query.double()
    k = key.double().repeat_interleave(times, dim=1)
    v = value.double().repeat_interleave(times, dim=1)

    visible = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    for group in groups:
        part = slice(group.start, group.start + group.length)
        visible[part, part] = group_mask(group, torch.device("cpu"))
    logits = (q @ k.transpose(2, 3) * SCALING).masked_fill(~visible, float("-inf"))
    return (logits.softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_equals_the_masked_softmax(layout: str, dtype: torch.dtype, tolerance: float):
    groups = groups_of(layout)
    query, key, value = states(groups[-1].start + groups[-1].length, dtype)
    calls = PackedLayout(groups, torch.device("cpu")).calls(dtype)
    got = shared_prefix_attention(query, key, value, calls, SCALING)
    expected = reference(query, key, value, groups)
    assert torch.allclose(got.double(), expected, atol=tolerance, rtol=tolerance)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((got * weights).sum(), (query, key, value))
    exact = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for found, wanted in zip(gradients, exact, strict=True):
        scale = float(wanted.abs().max())
        assert torch.allclose(found, wanted, atol=5 * tolerance * scale, rtol=0)


def test_both_ways_to_compute_a_group_are_taken():
    """A group of short responses is one masked call; long responses are sequences of their own."""
    layout = PackedLayout(groups_of("both"), torch.device("cpu"))
    calls = layout.calls(torch.float32)
    assert [(span.first, span.last) for span in calls.masked] == [(99, 143)]
    assert [(span.first, span.last, span.begin, span.end) for span in calls.prompts] == [
        (9, 99, 4, 9)
    ]
    # The group with one response [0, 4) and the prompt [4, 9); then the responses of 30 tokens.
    short, long = calls.causal
    assert sorted(set(short.tokens.tolist())) == list(range(9))
    assert long.tokens.tolist() == list(range(9, 99))
    assert short.padding is not None
    assert long.padding is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequences_of_other_lengths_in_a_call_change_nothing(dtype: torch.dtype):
    """Output and gradients of each sequence are those that it has alone."""
    lengths = [5, 13, 1, 9, 40, 48]
    starts = [0, *itertools.accumulate(lengths)]
    groups = [
        SegmentGroup(start, length - 1, (1,))
        for start, length in zip(starts, lengths, strict=False)
    ]
    query, key, value = states(sum(lengths), dtype)
    layout = PackedLayout(groups, torch.device("cpu"))
    assert len(layout.calls(dtype).causal) == 3
    together = shared_prefix_attention(query, key, value, layout.calls(dtype), SCALING)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad((together * weights).sum(), (query, key, value))

    for start, length in zip(starts, lengths, strict=False):
        part = slice(start, start + length)
        q, k, v = (whole[:, :, part].detach().requires_grad_() for whole in (query, key, value))
        alone = PackedLayout([SegmentGroup(0, length - 1, (1,))], torch.device("cpu"))
        output = shared_prefix_attention(q, k, v, alone.calls(dtype), SCALING)
        expected = torch.autograd.grad((output * weights[:, part]).sum(), (q, k, v))
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        assert torch.allclose(together[:, part], output, atol=tolerance)
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert torch.allclose(gradient[:, :, part], wanted, atol=5 * tolerance)


def test_a_merge_is_the_softmax_over_both_sets_of_keys():
    """Golden: logits 0 and log 3 with values 2 and 6 give (1 * 2 + 3 * 6) / 4 = 5."""
    output = torch.tensor([[[[2.0]]]])
    log_sums = torch.zeros(1, 1, 1)
    merge_into(output, log_sums, torch.tensor([[[[6.0]]]]), torch.full((1, 1, 1), 3.0).log())
    assert output.item() == pytest.approx(5.0)
    assert log_sums.exp().item() == pytest.approx(4.0)


def test_large_logits_do_not_overflow():
    """The merge is computed with differences of log-sums."""
    output = torch.tensor([[[[2.0]]]])
    log_sums = torch.full((1, 1, 1), 500.0)
    merge_into(output, log_sums, torch.tensor([[[[6.0]]]]), torch.full((1, 1, 1), 600.0))
    assert output.item() == pytest.approx(6.0)
    assert log_sums.item() == pytest.approx(600.0)
