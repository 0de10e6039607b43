"""Attention over a pack on a CPU, without a copy of the prompt's keys for each response.

A token of a response sees its prompt and its own response up to itself. The softmax over both sets
of keys is computed in two parts, which are merged by their sums of exponentials:

    l_p = log sum_{j in prompt} e^{s_j}
    l_r = log sum_{j in response} e^{s_j}
    l   = log(e^{l_p} + e^{l_r})
    o   = e^{l_p - l} o_p + e^{l_r - l} o_r

The queries of all responses of a group meet the prompt in one call, and each response meets itself
in one causal call: no keys are copied, and no product is computed only to be masked. Groups of
short responses are computed in one call with a mask, which is cheaper there.

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


# A group is computed in one masked call where that costs at most this many times the query-key
# products that are needed: a call has a cost of its own, so short responses are better joined.
SPLIT_WHEN_WASTED = 2.0


class Span(NamedTuple):
    """Queries [first, last) of the packed tokens, which see the keys [begin, end)."""

    first: int
    last: int
    begin: int
    end: int
    causal: bool
    mask: Tensor | None = None  # [queries, keys] added to the logits: 0 or -inf

    @property
    def queries(self) -> slice:
        """The queries' place in the pack."""
        return slice(self.first, self.last)

    @property
    def keys(self) -> slice:
        """The keys' place in the pack."""
        return slice(self.begin, self.end)


class PrefixSpans(NamedTuple):
    """The attention of one group, in calls of the kernel."""

    own: tuple[Span, ...]  # these cover every query of the group once
    shared: Span | None  # the responses' attention to their prompt, merged into `own`


def prefix_spans(group: SegmentGroup, make_mask: Callable[[], Tensor]) -> PrefixSpans:
    """Return the calls that compute a group: one for all of it, or its parts, whichever is cheaper.

    Args:
        make_mask: returns [L, L], 0 where a token of the group sees another and -inf elsewhere.
    """
    prompt, start = group.prompt_length, group.start
    stop = start + group.length
    lengths = group.response_lengths
    if group.length**2 <= SPLIT_WHEN_WASTED * group.visible_products:
        whole = Span(start, stop, start, stop, causal=False, mask=make_mask())
        return PrefixSpans((whole,), None)

    own = [Span(start, start + prompt, start, start + prompt, causal=True)]
    first = start + prompt
    for length in lengths:
        # A response of one token is empty in the pack, since its last token predicts nothing.
        if length:
            own.append(Span(first, first + length, first, first + length, causal=True))
        first += length
    return PrefixSpans(tuple(own), Span(start + prompt, stop, start, start + prompt, causal=False))


def is_applicable(query: Tensor, value: Tensor) -> bool:
    """Return whether the kernel computes these tensors."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
    )


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[PrefixSpans], scaling: float
) -> Tensor:
    """Return the attention of every token to its prompt and to its response up to itself.

    Shapes: query [1, h, n, d]; key and value [1, k, n, d], h a multiple of k (grouped queries)
    -> [1, n, h, d].
    """
    output = _SharedPrefixAttention.apply(query, key, value, tuple(spans), scaling)
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
        spans: tuple[PrefixSpans, ...],
        scaling: float,
    ) -> Tensor:
        keys = _for_all_heads(query, key)
        values = _for_all_heads(query, value)
        output = _empty_output(query)
        log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)

        def attend(span: Span) -> tuple[Tensor, Tensor]:
            return _forward(
                query[:, :, span.queries],
                keys[:, :, span.keys],
                values[:, :, span.keys],
                0.0,
                span.causal,
                attn_mask=span.mask,
                scale=scaling,
            )

        for own, shared in spans:
            for span in own:
                part = span.queries
                output[:, :, part], log_sums[:, :, part] = attend(span)
            if shared is not None:
                part = shared.queries
                merge_into(output[:, :, part], log_sums[:, :, part], *attend(shared))

        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.spans, ctx.scaling = spans, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        query, key, value, output, log_sums = ctx.saved_tensors
        keys = _for_all_heads(query, key)
        values = _for_all_heads(query, value)
        grad_query = torch.empty_like(query)
        grad_keys = torch.empty_like(keys)
        grad_values = torch.empty_like(values)

        def gradients(span: Span) -> tuple[Tensor, Tensor, Tensor]:
            part = span.queries
            return _backward(
                grad[:, :, part],
                query[:, :, part],
                keys[:, :, span.keys],
                values[:, :, span.keys],
                output[:, :, part],
                log_sums[:, :, part].contiguous(),
                0.0,
                span.causal,
                attn_mask=span.mask,
                scale=ctx.scaling,
            )

        for own, shared in ctx.spans:
            for span in own:
                of_query, of_keys, of_values = gradients(span)
                grad_query[:, :, span.queries] = of_query
                grad_keys[:, :, span.keys] = of_keys
                grad_values[:, :, span.keys] = of_values
            if shared is not None:
                of_query, of_keys, of_values = gradients(shared)
                grad_query[:, :, shared.queries] += of_query
                grad_keys[:, :, shared.keys] += of_keys
                grad_values[:, :, shared.keys] += of_values

        of_key = _sum_over_queries(grad_keys, key)
        of_value = _sum_over_queries(grad_values, value)
        return grad_query, of_key, of_value, None, None


def merge_into(output: Tensor, log_sums: Tensor, other: Tensor, other_log_sums: Tensor) -> None:
    """Merge attention to more keys into `output` [1, h, n, d] and `log_sums` [1, h, n]."""
    total = torch.logaddexp(log_sums, other_log_sums)
    weight = torch.exp(other_log_sums - total)[..., None]
    merged = torch.lerp(output.float(), other.float(), weight)
    output.copy_(merged)
    log_sums.copy_(total)


def _empty_output(query: Tensor) -> Tensor:
    """Return [1, h, n, d] whose transpose is contiguous, as the next projection reads it."""
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _for_all_heads(query: Tensor, states: Tensor) -> Tensor:
    """Return [1, h, n, d] of [1, k, n, d]: a key head for each query head."""
    times = query.shape[1] // states.shape[1]
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def _sum_over_queries(gradient: Tensor, states: Tensor) -> Tensor:
    """Return [1, k, n, d] of [1, h, n, d]: the gradient of a key head from all its query heads."""
    times = gradient.shape[1] // states.shape[1]
    return gradient if times == 1 else gradient.unflatten(1, (-1, times)).sum(dim=2)
