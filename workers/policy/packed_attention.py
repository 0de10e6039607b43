"""Attention inside a pack: each response sees its prompt and itself.

Registered with transformers under the names `packed_sdpa`, `packed_eager`, `packed_flex` and `packed_flash`, so that any model that calls its
attention through `AttentionInterface` (Llama, Qwen, Mistral, Gemma, ...) runs packed. The layout of the pack travels as the keyword
argument `packed_layout`, which transformers hands down to the attention function unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def group_mask(group: SegmentGroup, device: torch.device) -> Tensor:
    """[L, L] bool, True where token q (row) may see token k (column) of one segment group."""
    lengths = torch.tensor([group.prompt_length, *group.response_lengths], device=device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    order = torch.arange(group.length, device=device)
    visible = (segment[None, :] == 0) | (segment[None, :] == segment[:, None])
    return visible & (order[None, :] <= order[:, None])


# One call for a whole group computes scores between responses only to mask them; a call for each response computes none, but there are more calls.
SPLIT_WHEN_WASTED = 3.0


def attention_blocks(group: SegmentGroup, device: torch.device) -> list[AttentionBlock]:
    """The cheaper of the two ways to compute a group: all at once, or the prompt and each response for itself."""
    prompt = group.prompt_length
    split_cost = prompt**2 + sum(length * (prompt + length) for length in group.response_lengths)
    whole = group_mask(group, device)
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
    """Where the groups of a pack lie, with what each kernel derives from it once and uses in every layer."""

    def __init__(self, groups: Sequence[SegmentGroup], device: torch.device) -> None:
        self.groups = tuple(groups)
        self.device = device
        self._blocks: list[list[AttentionBlock]] | None = None
        self._block_mask: Any = None
        self._cumulative: Tensor | None = None

    @property
    def blocks(self) -> list[list[AttentionBlock]]:
        """The blocks of each group."""
        if self._blocks is None:
            self._blocks = [attention_blocks(group, self.device) for group in self.groups]
        return self._blocks

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
        return max(group.length for group in self.groups)

    def block_mask(self, num_tokens: int) -> Any:
        """FlexAttention's block mask of the whole pack."""
        if self._block_mask is None:
            from torch.nn.attention.flex_attention import create_block_mask

            group_of, segment_of = (
                torch.empty(num_tokens, dtype=torch.int64, device=self.device) for _ in range(2)
            )
            for number, group in enumerate(self.groups):
                part = slice(group.start, group.start + group.length)
                group_of[part] = number
                lengths = torch.tensor(
                    [group.prompt_length, *group.response_lengths], device=self.device
                )
                segment_of[part] = torch.repeat_interleave(
                    torch.arange(len(lengths), device=self.device), lengths
                )

            def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                same = (segment_of[k] == 0) | (segment_of[k] == segment_of[q])
                return (group_of[q] == group_of[k]) & same & (k <= q)

            self._block_mask = create_block_mask(
                visible, None, None, num_tokens, num_tokens, device=str(self.device)
            )
        return self._block_mask


def _repeat_heads(states: Tensor, times: int) -> Tensor:
    """[1, h, n, d] -> [1, h * times, n, d]: key/value heads shared by several query heads."""
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _per_group(
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor, float | None], Tensor],
) -> Callable[..., tuple[Tensor, None]]:
    """Attention function that runs `kernel` on the blocks of each group: cost grows with the groups' squares, not the pack's."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        *,
        packed_layout: PackedLayout,
        **_: Any,
    ) -> tuple[Tensor, None]:
        times = query.shape[1] // key.shape[1]
        key, value = _repeat_heads(key, times), _repeat_heads(value, times)
        outputs = []
        for group, blocks in zip(packed_layout.groups, packed_layout.blocks, strict=True):
            for block in blocks:
                first, last = block.queries
                seen_keys, seen_values = (
                    _joined(
                        [states[:, :, group.start + a : group.start + b] for a, b in block.keys]
                    )
                    for states in (key, value)
                )
                outputs.append(
                    kernel(
                        query[:, :, group.start + first : group.start + last],
                        seen_keys,
                        seen_values,
                        block.mask,
                        scaling,
                    )
                )
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    return attention


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    scores = (
        query.float()
        @ key.float().transpose(2, 3)
        * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    )
    return (scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value.float()).to(
        query.dtype
    )


def _flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    packed_layout: PackedLayout,
    **_: Any,
) -> tuple[Tensor, None]:
    from torch.nn.attention.flex_attention import flex_attention

    kernel = torch.compile(flex_attention, dynamic=True) if query.is_cuda else flex_attention
    block_mask = packed_layout.block_mask(query.shape[2])
    output = kernel(
        query,
        key,
        value,
        block_mask=block_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.transpose(1, 2), None


def _flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    packed_layout: PackedLayout,
    **_: Any,
) -> tuple[Tensor, None]:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]  (GPU extra)

    bounds, longest = packed_layout.cumulative_lengths, packed_layout.max_length
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    output = flash_attn_varlen_func(
        query, key, value, bounds, bounds, longest, longest, softmax_scale=scaling, causal=True
    )
    return output[None], None


_FUNCTIONS = {
    "sdpa": _per_group(_sdpa),
    "eager": _per_group(_eager),
    "flex_attention": _flex,
    "flash_attention_2": _flash,
}


def register_packed_attention(kernel: str) -> str:
    """Make `kernel` (a value of `model.attention`) known to transformers in its packed form, and return that form's name."""
    name = f"packed_{kernel}"
    AttentionInterface.register(name, _FUNCTIONS[kernel])
    return name
