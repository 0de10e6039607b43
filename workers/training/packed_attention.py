"""Attention inside a pack: each response sees its prompt and itself.

The functions are registered with transformers as `packed_<kernel>`, so that any model that calls
its attention through `AttentionInterface` (Llama, Qwen, Mistral, Gemma, ...) runs packed. The
layout of the pack is passed as the keyword argument `packed_layout`, which transformers hands down
to the attention function unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlsys.data.packing import SegmentGroup
from workers.training.shared_prefix_attention import (
    AttentionCalls,
    attention_calls,
    is_applicable,
    shared_prefix_attention,
)

SHARING_KERNELS = ("sdpa", "eager", "flex_attention")


@dataclass(frozen=True)
class AttentionBlock:
    """Queries of one group that are computed together, and the keys that they may see.

    Ranges [a, b) count from the start of the group.
    """

    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    mask: Tensor  # [queries, keys] bool


def _segments_and_positions(group: SegmentGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for the L tokens of a group, two arrays [L]: segments and positions.

    Segment 0 is the prompt. A token's position is that in its own sequence, so the positions of
    each response continue those of the prompt.
    """
    lengths = torch.tensor([group.prompt_length, *group.response_lengths], device=device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)

    positions = [torch.arange(group.prompt_length, device=device)]
    for length in group.response_lengths:
        positions.append(group.prompt_length + torch.arange(length, device=device))
    return segment, torch.cat(positions)


def group_mask(group: SegmentGroup, device: torch.device, window: int | None = None) -> Tensor:
    """Return [L, L] bool, True where token q (row) may see token k (column) of one segment group.

    With a sliding window q sees the last `window` tokens of its own sequence, itself included.
    """
    segment, position = _segments_and_positions(group, device)
    # The prompt is visible to all tokens, a response to itself only.
    visible = (segment[None, :] == 0) | (segment[None, :] == segment[:, None])

    distance = position[:, None] - position[None, :]
    visible &= distance >= 0
    if window is not None:
        visible &= distance < window
    return visible


# A group is split into one call per response where a single call would compute this many times the
# query-key products that are needed. The single call computes products between responses, only to
# mask them; the split avoids those, but makes more calls.
SPLIT_WHEN_WASTED = 3.0


def attention_blocks(
    group: SegmentGroup, device: torch.device, window: int | None = None
) -> list[AttentionBlock]:
    """Return the blocks of a group: one for all of it, or the prompt and each response separately.

    The cheaper of the two is chosen.
    """
    prompt = group.prompt_length
    whole = group_mask(group, device, window)
    if group.length**2 <= SPLIT_WHEN_WASTED * group.visible_products:
        return [AttentionBlock((0, group.length), ((0, group.length),), whole)]

    blocks = [AttentionBlock((0, prompt), ((0, prompt),), whole[:prompt, :prompt])]
    start = prompt
    for length in group.response_lengths:
        end = start + length
        # A response of one token is empty in the pack, since its last token predicts nothing.
        if length:
            mask = torch.cat([whole[start:end, :prompt], whole[start:end, start:end]], dim=1)
            blocks.append(AttentionBlock((start, end), ((0, prompt), (start, end)), mask))
        start = end
    return blocks


class PackedLayout:
    """The groups of a pack, and the masks that kernels derive from them.

    A mask is built at its first use and shared by all layers.
    """

    def __init__(self, groups: Sequence[SegmentGroup], device: torch.device) -> None:
        self.groups = tuple(groups)
        self.device = device
        # Layers may differ in their window, so masks are kept for each.
        self._blocks: dict[int | None, list[list[AttentionBlock]]] = {}
        self._block_masks: dict[int | None, Any] = {}
        self._cumulative: Tensor | None = None
        self._calls: dict[torch.dtype, AttentionCalls] = {}

    def window(self, sliding_window: int | None) -> int | None:
        """Return the window if it hides any token of this pack from another, else None."""
        if sliding_window is None or self.max_length <= sliding_window:
            return None
        return sliding_window

    def blocks(self, window: int | None = None) -> list[list[AttentionBlock]]:
        """Return the blocks of each group."""
        if window not in self._blocks:
            self._blocks[window] = [
                attention_blocks(group, self.device, window) for group in self.groups
            ]
        return self._blocks[window]

    def calls(self, dtype: torch.dtype) -> AttentionCalls:
        """Return the calls of `shared_prefix_attention`, for queries of a dtype."""

        def additive_mask(group: SegmentGroup) -> Tensor:
            visible = group_mask(group, self.device)
            return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))

        if dtype not in self._calls:
            self._calls[dtype] = attention_calls(self.groups, additive_mask)
        return self._calls[dtype]

    @property
    def cumulative_lengths(self) -> Tensor:
        """Boundaries of the groups, [groups + 1] int32, for kernels over plain sequences.

        Such kernels know no shared prompts, so each group must have a single response.
        """
        if self._cumulative is None:
            single = all(len(group.response_lengths) == 1 for group in self.groups)
            assert single, "this kernel cannot share prompts"
            lengths = torch.tensor(
                [0, *(group.length for group in self.groups)], device=self.device
            )
            self._cumulative = lengths.cumsum(0).to(torch.int32)
        return self._cumulative

    @property
    def max_length(self) -> int:
        """The number of tokens of the longest group."""
        return max(group.length for group in self.groups)

    def block_mask(self, num_tokens: int, window: int | None = None) -> Any:
        """Return FlexAttention's block mask of the whole pack."""
        if window not in self._block_masks:
            self._block_masks[window] = self._make_block_mask(num_tokens, window)
        return self._block_masks[window]

    def _make_block_mask(self, num_tokens: int, window: int | None) -> Any:
        """Build FlexAttention's block mask: `group_mask` for every group, and nothing between."""
        from torch.nn.attention.flex_attention import create_block_mask

        group_of, segment_of, position_of = (
            torch.empty(num_tokens, dtype=torch.int64, device=self.device) for _ in range(3)
        )
        for number, group in enumerate(self.groups):
            part = slice(group.start, group.start + group.length)
            group_of[part] = number
            segment_of[part], position_of[part] = _segments_and_positions(group, self.device)

        # Without a window no distance is too large.
        reach = num_tokens if window is None else window

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (segment_of[k] == 0) | (segment_of[k] == segment_of[q])
            distance = position_of[q] - position_of[k]
            near = (distance >= 0) & (distance < reach)
            return (group_of[q] == group_of[k]) & same & near

        return create_block_mask(
            visible, None, None, num_tokens, num_tokens, device=str(self.device)
        )


# Keywords that transformers passes to every attention function and that change nothing in a packed,
# causal forward pass without a cache. Any other keyword with a value is refused: ignoring it would
# silently drop a feature of the model.
_WITHOUT_EFFECT = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "past_key_values",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "deterministic",
        "position_embeddings",
        "is_causal",  # False is refused
    }
)


class UnsupportedAttentionError(ValueError):
    """The model's attention has a feature that packed attention does not implement."""


def _check_keywords(
    dropout: float, attention_mask: Tensor | None, further: Mapping[str, Any]
) -> None:
    """Refuse features of a model's attention that packed attention does not implement.

    Raises:
        UnsupportedAttentionError: names the feature.
    """
    if dropout:
        raise UnsupportedAttentionError(
            f"packed attention has no dropout, and the model sets it to {dropout:g}"
        )
    if further.get("is_causal") is False:
        raise UnsupportedAttentionError("packed attention is causal, and the model's is not")
    if attention_mask is not None:
        raise UnsupportedAttentionError(
            "packed attention makes its own mask, and the model passes another"
        )

    unknown = sorted(
        name
        for name, value in further.items()
        if name not in _WITHOUT_EFFECT and value is not None and value is not False
    )
    if unknown:
        raise UnsupportedAttentionError(
            f"packed attention does not implement the keyword {', '.join(unknown)}"
        )


@dataclass(frozen=True, kw_only=True)
class _AttentionCall:
    """One layer's attention over a pack of n tokens."""

    query: Tensor  # [1, heads, n, d]
    key: Tensor  # [1, key heads, n, d]
    value: Tensor  # [1, key heads, n, d]
    layout: PackedLayout
    scaling: float | None
    window: int | None
    softcap: float | None


def _packed(attend: Callable[[_AttentionCall], Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Wrap `attend` in the signature that transformers calls, with a check of the keywords."""

    # The signature is that of transformers' attention interface.
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        *,
        packed_layout: PackedLayout | None = None,
        **further: Any,
    ) -> tuple[Tensor, None]:
        if packed_layout is None:
            raise UnsupportedAttentionError(
                "the model does not hand the layout of a pack down to its attention"
            )

        window = further.pop("sliding_window", None)
        softcap = further.pop("softcap", None)
        _check_keywords(dropout, attention_mask, further)

        call = _AttentionCall(
            query=query,
            key=key,
            value=value,
            layout=packed_layout,
            scaling=scaling,
            window=packed_layout.window(window),
            softcap=softcap,
        )
        return attend(call), None

    return attention


def _repeat_heads(states: Tensor, times: int) -> Tensor:
    """Repeat key or value heads for the query heads that share them.

    Shapes: [1, h, n, d] -> [1, h * times, n, d].
    """
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def _select(states: Tensor, start: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Return the tokens of `ranges`, which count from the token `start` of the pack."""
    parts = [states[:, :, start + a : start + b] for a, b in ranges]
    # A single range stays a view of `states`.
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


# query, key, value, mask, scaling, softcap -> output
BlockKernel = Callable[[Tensor, Tensor, Tensor, Tensor, float | None, float | None], Tensor]


def _per_group(kernel: BlockKernel) -> Callable[[_AttentionCall], Tensor]:
    """Return attention that runs `kernel` on the blocks of each group.

    So the cost grows with the squares of the groups' lengths, not with that of the pack's.
    """

    def attend(call: _AttentionCall) -> Tensor:
        # Grouped-query attention: several query heads share a key head.
        times = call.query.shape[1] // call.key.shape[1]
        key = _repeat_heads(call.key, times)
        value = _repeat_heads(call.value, times)

        outputs = []
        blocks_of_groups = call.layout.blocks(call.window)
        for group, blocks in zip(call.layout.groups, blocks_of_groups, strict=True):
            for block in blocks:
                output = kernel(
                    _select(call.query, group.start, [block.queries]),
                    _select(key, group.start, block.keys),
                    _select(value, group.start, block.keys),
                    block.mask,
                    call.scaling,
                    call.softcap,
                )
                outputs.append(output)
        return torch.cat(outputs, dim=2).transpose(1, 2)

    return attend


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attend with torch's fused kernel, which has no softcap."""
    if softcap is not None:
        return _eager(query, key, value, mask, scaling, softcap)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


_sdpa_by_blocks = _per_group(_sdpa)


def _sdpa_of_packs(call: _AttentionCall) -> Tensor:
    """Attend with torch's fused kernel, on a CPU without copies of the prompt's keys."""
    plain = call.window is None and call.softcap is None
    if not plain or not is_applicable(call.query, call.value):
        return _sdpa_by_blocks(call)

    scaling = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    calls = call.layout.calls(call.query.dtype)
    return shared_prefix_attention(call.query, call.key, call.value, calls, scaling)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attend with plain matrix products, in float32."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query.float() @ key.float().transpose(2, 3) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)

    weights = logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ value.float()).to(query.dtype)


def _flex(call: _AttentionCall) -> Tensor:
    """Attend with FlexAttention and one block mask for the whole pack."""
    from torch.nn.attention.flex_attention import flex_attention

    softcap = call.softcap

    def capped(logit: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(logit / softcap)

    # Compiled, the kernel skips masked blocks; a CPU runs torch's plain implementation.
    kernel = torch.compile(flex_attention, dynamic=True) if call.query.is_cuda else flex_attention
    output = kernel(
        call.query,
        call.key,
        call.value,
        score_mod=None if softcap is None else capped,
        block_mask=call.layout.block_mask(call.query.shape[2], call.window),
        scale=call.scaling,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.transpose(1, 2)


def _flash(call: _AttentionCall) -> Tensor:
    """Attend with FlashAttention over sequences of different lengths."""
    # The package is in the GPU extra only.
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    bounds = call.layout.cumulative_lengths
    longest = call.layout.max_length
    # FlashAttention counts the tokens to the left, without the query's own; -1 is no limit.
    window = (-1, -1) if call.window is None else (call.window - 1, 0)
    output = flash_attn_varlen_func(
        call.query[0].transpose(0, 1),
        call.key[0].transpose(0, 1),
        call.value[0].transpose(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        softmax_scale=call.scaling,
        causal=True,
        window_size=window,
        softcap=call.softcap or 0.0,
    )
    return output[None]


_FUNCTIONS = {
    "sdpa": _packed(_sdpa_of_packs),
    "eager": _packed(_per_group(_eager)),
    "flex_attention": _packed(_flex),
    "flash_attention_2": _packed(_flash),
}


def register_packed_attention(kernel: str) -> str:
    """Register the packed form of `kernel` with transformers and return its name.

    Args:
        kernel: a value of `model.attention` other than auto.
    """
    from transformers import AttentionInterface

    name = f"packed_{kernel}"
    AttentionInterface.register(name, _FUNCTIONS[kernel])
    return name
