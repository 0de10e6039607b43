"""Attention over a pack on a CPU, without a copy of the prompt's keys for each response.

A token of a response sees its prompt and its own response up to itself. The softmax over both sets
of keys is computed in two parts, which are merged by their sums of exponentials:

    l_p = log sum_{j in prompt} e^{s_j}
    l_r = log sum_{j in response} e^{s_j}
    l   = log(e^{l_p} + e^{l_r})
    o   = e^{l_p - l} o_p + e^{l_r - l} o_r

The queries of all responses of a group meet the prompt in one call. The prompts and the responses
themselves are causal sequences; those of similar length in the whole pack are computed in one call,
padded on the right, which a causal query never sees. No product is computed only to be masked,
except in groups of short responses: one call with a mask is cheaper there.

The gradient of flash attention for a set of keys needs the output o and the log-sum l alone
(P_j = e^{s_j - l}), so the backward pass calls the same kernel for each set, with the merged o
and l.

Source: Dao et al. (2022), FlashAttention, section 3.1 and appendix B.2: the merge of blocks and the
backward pass from the saved log-sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlsys.data.packing import SegmentGroup

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Up to so many queries and keys of a sequence the kernel's backward pass is faster in float32 than
# in bfloat16, whose small products are slow: docs/measurements_log.md.
FLOAT32_QUERIES = 512
FLOAT32_KEYS = 256


# A group is computed in one masked call where that costs at most this many times the query-key
# products that are needed: a call has a cost of its own, so short responses are better joined.
SPLIT_WHEN_WASTED = 2.0

# The log-sum of a query that is padding: its probabilities e^{s - l} are 0, and so its gradients.
_NO_PROBABILITY = 1e30


class Span(NamedTuple):
    """Queries [first, last) of the packed tokens, which see the keys [begin, end)."""

    first: int
    last: int
    begin: int
    end: int
    mask: Tensor | None = None  # [queries, keys] added to the logits: 0 or -inf

    @property
    def queries(self) -> slice:
        """The queries' place in the pack."""
        return slice(self.first, self.last)

    @property
    def keys(self) -> slice:
        """The keys' place in the pack."""
        return slice(self.begin, self.end)


class CausalBatch(NamedTuple):
    """b sequences of the pack in one causal call, padded on the right to L tokens."""

    size: int  # b
    tokens: Tensor  # [b * L] into the pack; padding repeats the last token of its sequence
    padding: Tensor | None  # [b, 1, L] bool; None: there is none
    places: Tensor | None  # [r] those of `tokens` that are no padding; None: all

    def take(self, states: Tensor) -> Tensor:
        """Return [b, h, L, ...] of [1, h, n, ...]."""
        rows = states[0].transpose(0, 1).index_select(0, self.tokens)
        return rows.unflatten(0, (self.size, -1)).transpose(1, 2)

    def put(self, states: Tensor, values: Tensor) -> None:
        """Write [b, h, L, ...] to its tokens in [1, h, n, ...]."""
        rows = values.transpose(1, 2).flatten(0, 1).to(states.dtype)
        tokens = self.tokens
        if self.places is not None:
            rows = rows.index_select(0, self.places)
            tokens = tokens.index_select(0, self.places)
        states[0].transpose(0, 1).index_copy_(0, tokens, rows)


class AttentionCalls(NamedTuple):
    """The attention of a pack in calls of the kernel."""

    causal: tuple[CausalBatch, ...]  # these and the next cover every query once
    masked: tuple[Span, ...]
    prompts: tuple[Span, ...]  # attention of responses to their prompt, merged into the others


def attention_calls(
    groups: Sequence[SegmentGroup], make_mask: Callable[[SegmentGroup], Tensor]
) -> AttentionCalls:
    """Return the calls that compute a pack.

    Args:
        make_mask: returns [L, L], 0 where a token of the group sees another and -inf elsewhere.
    """
    sequences: list[range] = []
    masked: list[Span] = []
    prompts: list[Span] = []
    for group in groups:
        start, stop = group.start, group.start + group.length
        # A response of one token is empty in the pack, since its last token predicts nothing.
        lengths = [length for length in group.response_lengths if length]
        if len(lengths) <= 1:
            sequences.append(range(start, stop))
        elif group.length**2 <= SPLIT_WHEN_WASTED * group.visible_products:
            masked.append(Span(start, stop, start, stop, mask=make_mask(group)))
        else:
            first = start + group.prompt_length
            sequences.append(range(start, first))
            prompts.append(Span(first, stop, start, first))
            for length in lengths:
                sequences.append(range(first, first + length))
                first += length
    return AttentionCalls(causal_batches(sequences), tuple(masked), tuple(prompts))


def causal_batches(sequences: Sequence[range]) -> tuple[CausalBatch, ...]:
    """Return batches of sequences of similar length, which together hold all `sequences`."""
    batches: list[list[range]] = []
    for sequence in sorted(sequences, key=len):
        if batches and len(sequence) <= _longest_beside(len(batches[-1][0])):
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return tuple(_causal_batch(batch) for batch in batches)


def _longest_beside(shortest: int) -> int:
    """Return the length of the longest sequence that shares a call with one of this length."""
    return max(shortest + 8, shortest * 5 // 4)


def _causal_batch(sequences: Sequence[range]) -> CausalBatch:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    starts = torch.tensor([sequence.start for sequence in sequences])
    columns = torch.arange(int(lengths.max()))

    last = lengths[:, None] - 1
    tokens = starts[:, None] + torch.minimum(columns, last)
    padding = columns > last
    is_padded = bool(padding.any())
    return CausalBatch(
        size=len(sequences),
        tokens=tokens.flatten(),
        padding=padding[:, None] if is_padded else None,
        places=(~padding).flatten().nonzero()[:, 0] if is_padded else None,
    )


def is_applicable(query: Tensor, value: Tensor) -> bool:
    """Return whether the kernel computes these tensors."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
    )


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, calls: AttentionCalls, scaling: float
) -> Tensor:
    """Return the attention of every token to its prompt and to its response up to itself.

    Shapes: query [1, h, n, d]; key and value [1, k, n, d], h a multiple of k (grouped queries)
    -> [1, n, h, d].
    """
    output = _SharedPrefixAttention.apply(query, key, value, calls, scaling)
    assert isinstance(output, Tensor)
    return output.transpose(1, 2)


class _SharedPrefixAttention(torch.autograd.Function):
    """[1, h, n, d] of the attention; saves its inputs, its output and one log-sum per query."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        calls: AttentionCalls,
        scaling: float,
    ) -> Tensor:
        keys = _for_all_heads(query, key)
        values = _for_all_heads(query, value)
        output = _token_major(query, query.shape[-1:], query.dtype)
        log_sums = _token_major(query, (), torch.float32)

        for batch in calls.causal:
            inputs = (batch.take(states) for states in (query, keys, values))
            part, sums = _forward(*inputs, 0.0, True, scale=scaling)
            batch.put(output, part)
            batch.put(log_sums, sums)

        def attend(span: Span) -> tuple[Tensor, Tensor]:
            return _forward(
                query[:, :, span.queries],
                keys[:, :, span.keys],
                values[:, :, span.keys],
                0.0,
                False,
                attn_mask=span.mask,
                scale=scaling,
            )

        for span in calls.masked:
            output[:, :, span.queries], log_sums[:, :, span.queries] = attend(span)
        for span in calls.prompts:
            part = span.queries
            merge_into(output[:, :, part], log_sums[:, :, part], *attend(span))

        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.calls, ctx.scaling = calls, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        query, key, value, output, log_sums = ctx.saved_tensors
        keys = _for_all_heads(query, key)
        values = _for_all_heads(query, value)
        totals = tuple(torch.empty_like(states) for states in (query, keys, values))

        for batch in ctx.calls.causal:
            inputs = (batch.take(states) for states in (grad, query, keys, values, output))
            sums = batch.take(log_sums).contiguous()
            if batch.padding is not None:
                sums.masked_fill_(batch.padding, _NO_PROBABILITY)
            gradients = _gradients(*inputs, sums, causal=True, scaling=ctx.scaling)
            for total, gradient in zip(totals, gradients, strict=True):
                batch.put(total, gradient)

        def gradients_of(span: Span) -> tuple[Tensor, Tensor, Tensor]:
            part = span.queries
            return _gradients(
                grad[:, :, part],
                query[:, :, part],
                keys[:, :, span.keys],
                values[:, :, span.keys],
                output[:, :, part],
                log_sums[:, :, part].contiguous(),
                causal=False,
                scaling=ctx.scaling,
                mask=span.mask,
            )

        for span in ctx.calls.masked:
            places = (span.queries, span.keys, span.keys)
            for total, place, gradient in zip(totals, places, gradients_of(span), strict=True):
                total[:, :, place] = gradient
        for span in ctx.calls.prompts:
            places = (span.queries, span.keys, span.keys)
            for total, place, gradient in zip(totals, places, gradients_of(span), strict=True):
                total[:, :, place] += gradient

        grad_query, grad_keys, grad_values = totals
        of_key = _sum_over_queries(grad_keys, key)
        of_value = _sum_over_queries(grad_values, value)
        return grad_query, of_key, of_value, None, None


def _gradients(
    *states: Tensor, causal: bool, scaling: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value of one call; in float32 for short sequences.

    Args:
        states: gradient of the output, query, key, value, output, log-sums.
    """
    _, query, key, *_ = states
    if query.shape[2] <= FLOAT32_QUERIES and key.shape[2] <= FLOAT32_KEYS:
        states = tuple(each.float() for each in states)
        mask = None if mask is None else mask.float()
    return _backward(*states, 0.0, causal, attn_mask=mask, scale=scaling)


def merge_into(output: Tensor, log_sums: Tensor, other: Tensor, other_log_sums: Tensor) -> None:
    """Merge attention to more keys into `output` [1, h, n, d] and `log_sums` [1, h, n]."""
    total = torch.logaddexp(log_sums, other_log_sums)
    weight = torch.exp(other_log_sums - total)[..., None]
    merged = torch.lerp(output.float(), other.float(), weight)
    output.copy_(merged)
    log_sums.copy_(total)


def _token_major(query: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an empty [1, h, n, *shape] with the values of a token side by side.

    So the next projection reads the output, and the batches write their rows.
    """
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, *shape, dtype=dtype).transpose(1, 2)


def _for_all_heads(query: Tensor, states: Tensor) -> Tensor:
    """Return [1, h, n, d] of [1, k, n, d]: a key head for each query head."""
    times = query.shape[1] // states.shape[1]
    if times == 1:
        return states
    return states.transpose(1, 2).repeat_interleave(times, dim=2).transpose(1, 2)


def _sum_over_queries(gradient: Tensor, states: Tensor) -> Tensor:
    """Return [1, k, n, d] of [1, h, n, d]: the gradient of a key head from all its query heads."""
    times = gradient.shape[1] // states.shape[1]
    return gradient if times == 1 else gradient.unflatten(1, (-1, times)).sum(dim=2)
