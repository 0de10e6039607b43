"""Attention inside a pack: each response sees its prompt and itself.

Registered with transformers under the names `packed_sdpa`, `packed_eager`, `packed_flex` and `packed_flash`, so that any model that calls its
attention through `AttentionInterface` (Llama, Qwen, Mistral, Gemma, ...) runs packed. The layout of the pack travels as the keyword
argument `packed_layout`, which transformers hands down to the attention function unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from rlsys.data.packing import SegmentGroup

SHARING_KERNELS = ("sdpa", "eager", "flex_attention")


@dataclass(frozen=True)
class AttentionBlock:
    """Queries of a group that are computed together, and the keys that they may see: [a, b) ranges within the group."""

    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    mask: Tensor  # [queries, keys] bool


def _segments_and_positions(group: SegmentGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return [L] the segment of each token (0 is the prompt) and [L] its position in its sequence."""
    lengths = torch.tensor([group.prompt_length, *group.response_lengths], device=device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    responses = [torch.arange(n, device=device) for n in group.response_lengths]
    position = torch.cat(
        [
            torch.arange(group.prompt_length, device=device),
            *(group.prompt_length + span for span in responses),
        ]
    )
    return segment, position


def group_mask(group: SegmentGroup, device: torch.device, window: int | None = None) -> Tensor:
    """Return [L, L] bool, True where token q (row) may see token k (column) of one segment group.

    With a sliding window q sees the last `window` tokens of its own sequence, itself included.
    """
    segment, position = _segments_and_positions(group, device)
    visible = (segment[None, :] == 0) | (segment[None, :] == segment[:, None])
    distance = position[:, None] - position[None, :]
    visible &= distance >= 0
    if window is not None:
        visible &= distance < window
    return visible


# One call for a whole group computes scores between responses only to mask them; a call for each response computes none, but there are more calls.
SPLIT_WHEN_WASTED = 3.0


def attention_blocks(
    group: SegmentGroup, device: torch.device, window: int | None = None
) -> list[AttentionBlock]:
    """Return the cheaper of the two ways to compute a group: all at once, or the prompt and each response for itself."""
    prompt = group.prompt_length
    split_cost = prompt**2 + sum(length * (prompt + length) for length in group.response_lengths)
    whole = group_mask(group, device, window)
    if group.length**2 <= SPLIT_WHEN_WASTED * split_cost:
        return [AttentionBlock((0, group.length), ((0, group.length),), whole)]
    blocks = [AttentionBlock((0, prompt), ((0, prompt),), whole[:prompt, :prompt])]
    start = prompt
    for length in group.response_lengths:
        end = start + length
        if length:
            mask = torch.cat([whole[start:end, :prompt], whole[start:end, start:end]], dim=1)
            blocks.append(AttentionBlock((start, end), ((0, prompt), (start, end)), mask))
        start = end
    return blocks


class PackedLayout:
    """The groups of a pack, with what each kernel derives from them once and uses in every layer."""

    def __init__(self, groups: Sequence[SegmentGroup], device: torch.device) -> None:
        self.groups = tuple(groups)
        self.device = device
        self._blocks: dict[int | None, list[list[AttentionBlock]]] = {}
        self._block_masks: dict[int | None, Any] = {}
        self._cumulative: Tensor | None = None

    def window(self, sliding_window: int | None) -> int | None:
        """Return the window where it hides a token of this pack from another, else None."""
        return (
            None if sliding_window is None or self.max_length <= sliding_window else sliding_window
        )

    def blocks(self, window: int | None = None) -> list[list[AttentionBlock]]:
        """Return the blocks of each group."""
        if window not in self._blocks:
            self._blocks[window] = [
                attention_blocks(group, self.device, window) for group in self.groups
            ]
        return self._blocks[window]

    @property
    def cumulative_lengths(self) -> Tensor:
        """[groups + 1] int32, for kernels over plain sequences; groups must be single sequences then."""
        if self._cumulative is None:
            assert all(len(group.response_lengths) == 1 for group in self.groups), (
                "this kernel cannot share prompts"
            )
            lengths = torch.tensor(
                [0, *(group.length for group in self.groups)], device=self.device
            )
            self._cumulative = lengths.cumsum(0).to(torch.int32)
        return self._cumulative

    @property
    def max_length(self) -> int:
        """Tokens of the longest group."""
        return max(group.length for group in self.groups)

    def block_mask(self, num_tokens: int, window: int | None = None) -> Any:
        """Return FlexAttention's block mask of the whole pack."""
        if window not in self._block_masks:
            self._block_masks[window] = self._make_block_mask(num_tokens, window)
        return self._block_masks[window]

    def _make_block_mask(self, num_tokens: int, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        group_of, segment_of, position_of = (
            torch.empty(num_tokens, dtype=torch.int64, device=self.device) for _ in range(3)
        )
        for number, group in enumerate(self.groups):
            part = slice(group.start, group.start + group.length)
            group_of[part] = number
            segment_of[part], position_of[part] = _segments_and_positions(group, self.device)
        reach = num_tokens if window is None else window

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (segment_of[k] == 0) | (segment_of[k] == segment_of[q])
            distance = position_of[q] - position_of[k]
            return (group_of[q] == group_of[k]) & same & (distance >= 0) & (distance < reach)

        return create_block_mask(
            visible, None, None, num_tokens, num_tokens, device=str(self.device)
        )


# What transformers hands to every attention function and what changes nothing in a packed, causal
# forward pass without a cache. Anything else with a value is refused: a keyword that is silently
# dropped is a feature of the model that is silently dropped.
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
    }
)


class UnsupportedAttentionError(ValueError):
    """The model's attention has a feature that packed attention does not implement."""


def _check_keywords(
    dropout: float, is_causal: bool | None, attention_mask: Tensor | None, others: Mapping[str, Any]
) -> None:
    """Refuse what would be computed wrong.

    Raises:
        UnsupportedAttentionError: names the feature.
    """
    if dropout:
        raise UnsupportedAttentionError(
            f"packed attention has no dropout, and the model asks for {dropout:g}"
        )
    if is_causal is False:
        raise UnsupportedAttentionError("packed attention is causal, and the model's is not")
    if attention_mask is not None:
        raise UnsupportedAttentionError(
            "packed attention makes its own mask, and the model brings one"
        )
    unknown = sorted(
        name
        for name, value in others.items()
        if name not in _WITHOUT_EFFECT and value is not None and value is not False
    )
    if unknown:
        raise UnsupportedAttentionError(
            f"packed attention does not know the keyword {', '.join(unknown)}"
        )


@dataclass(frozen=True, kw_only=True)
class _AttentionCall:
    """One layer's attention over a pack: [1, heads, n, d] queries, [1, key heads, n, d] keys and values."""

    query: Tensor
    key: Tensor
    value: Tensor
    layout: PackedLayout
    scaling: float | None
    window: int | None
    softcap: float | None


def _packed(attend: Callable[[_AttentionCall], Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Return the attention function in the form that transformers calls; its keywords are checked here."""

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
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if packed_layout is None:
            raise UnsupportedAttentionError(
                "the model does not hand the layout of a pack down to its attention"
            )
        _check_keywords(dropout, is_causal, attention_mask, others)
        call = _AttentionCall(
            query=query,
            key=key,
            value=value,
            layout=packed_layout,
            scaling=scaling,
            window=packed_layout.window(sliding_window),
            softcap=softcap,
        )
        return attend(call), None

    return attention


def _repeat_heads(states: Tensor, times: int) -> Tensor:
    """[1, h, n, d] -> [1, h * times, n, d]: key/value heads shared by several query heads."""
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


BlockKernel = Callable[[Tensor, Tensor, Tensor, Tensor, float | None, float | None], Tensor]


def _per_group(kernel: BlockKernel) -> Callable[[_AttentionCall], Tensor]:
    """Run `kernel` on the blocks of each group: cost grows with the groups' squares, not the pack's."""

    def attend(call: _AttentionCall) -> Tensor:
        times = call.query.shape[1] // call.key.shape[1]
        key, value = _repeat_heads(call.key, times), _repeat_heads(call.value, times)
        outputs = []
        blocks_of_groups = call.layout.blocks(call.window)
        for group, blocks in zip(call.layout.groups, blocks_of_groups, strict=True):
            for block in blocks:
                first, last = block.queries
                queries = call.query[:, :, group.start + first : group.start + last]
                seen_keys, seen_values = (
                    _joined(
                        [states[:, :, group.start + a : group.start + b] for a, b in block.keys]
                    )
                    for states in (key, value)
                )
                outputs.append(
                    kernel(queries, seen_keys, seen_values, block.mask, call.scaling, call.softcap)
                )
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
    if softcap is not None:  # torch's kernel has none
        return _eager(query, key, value, mask, scaling, softcap)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query.float() @ key.float().transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ value.float()).to(query.dtype)


def _flex(call: _AttentionCall) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    softcap = call.softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

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
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]  (GPU extra)

    bounds, longest = call.layout.cumulative_lengths, call.layout.max_length
    query, key, value = (states[0].transpose(0, 1) for states in (call.query, call.key, call.value))
    output = flash_attn_varlen_func(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        softmax_scale=call.scaling,
        causal=True,
        window_size=(-1, -1) if call.window is None else (call.window - 1, 0),
        softcap=call.softcap or 0.0,
    )
    return output[None]


_FUNCTIONS = {
    "sdpa": _packed(_per_group(_sdpa)),
    "eager": _packed(_per_group(_eager)),
    "flex_attention": _packed(_flex),
    "flash_attention_2": _packed(_flash),
}


def register_packed_attention(kernel: str) -> str:
    """Make `kernel` (a value of `model.attention`) known to transformers in its packed form, and return that form's name."""
    name = f"packed_{kernel}"
    AttentionInterface.register(name, _FUNCTIONS[kernel])
    return name
