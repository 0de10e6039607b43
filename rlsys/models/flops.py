"""Floating-point operations of a decoder, and the share of a GPU's peak that a run makes of them.

Only products that the model needs are counted: no recomputed activations, no masked query-key
pairs, no padding. So the utilization does not rise with wasted work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DecoderSize:
    """The numbers of a decoder on which its operations depend."""

    block_parameters: int  # of the matrices in the decoder's blocks
    head_parameters: int  # of the LM head: hidden size x vocabulary
    layers: int
    attention_width: int  # query heads x head dimension

    @property
    def parameters(self) -> int:
        """Parameters that take part in matrix products; an embedding that is tied counts once."""
        return self.block_parameters + self.head_parameters


def visible_pairs(prompt_length: int, response_lengths: Sequence[int] = ()) -> int:
    """Return the query-key pairs of a prompt and responses that see it and themselves.

        p (p + 1) / 2 + sum_i (r_i p + r_i (r_i + 1) / 2)

    Example: a prompt of 2 and responses of 1 and 2: 3 + (2 + 1) + (4 + 3) = 13.
    """
    prompt = prompt_length
    own = prompt * (prompt + 1) // 2
    return own + sum(r * prompt + r * (r + 1) // 2 for r in response_lengths)


def forward_flops(size: DecoderSize, *, tokens: int, predicted: int, pairs: int) -> int:
    """Return the operations of one forward pass.

        2 N_blocks n + 2 N_head m + 4 L w P

    for n tokens, of which m go through the LM head, and P query-key pairs in each of L layers of
    attention width w: a pair costs 2 w for q k and 2 w for p v.

    Source: Chowdhery et al. (2022), PaLM, appendix B. There every token is predicted (m = n) and
    every pair is counted (P = n T).
    """
    products = 2 * (size.block_parameters * tokens + size.head_parameters * predicted)
    return products + 4 * size.layers * size.attention_width * pairs


def training_flops(size: DecoderSize, *, tokens: int, predicted: int, pairs: int) -> int:
    """Return the operations of forward and backward pass: three times those of the forward pass.

    With m = n that is 6 N n + 12 L w P: the backward pass has two products for each of the forward
    pass. Recomputed activations are not counted.
    """
    return 3 * forward_flops(size, tokens=tokens, predicted=predicted, pairs=pairs)


def generation_flops(size: DecoderSize, *, prompt_length: int, lengths: Iterable[int]) -> int:
    """Return the operations of sampling one response of each length, with a cache.

    The prompt is computed once for each response. The last token of a response is sampled, but does
    not go through the model.
    """
    total = 0
    for length in lengths:
        total += forward_flops(
            size,
            tokens=prompt_length + length - 1,
            predicted=length,
            pairs=visible_pairs(prompt_length + length - 1),
        )
    return total


def model_flops_utilization(flops: float, seconds: float, peak: float) -> float:
    """Return flops / (seconds * peak): the share of the peak that was useful work.

    Args:
        peak: operations per second.

    Source: Chowdhery et al. (2022), PaLM, section 4.1.
    """
    return flops / (seconds * peak)


# Peak bfloat16 operations per second on dense matrices, accumulated in float32, from NVIDIA's data
# sheets. A name matches if it contains all words; the first match counts, so variants stand first.
PEAK_BFLOAT16: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB200",), 2500e12),
    (("B200",), 2250e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("GH200",), 989e12),
    (("H100", "NVL"), 835e12),
    (("H100", "PCIE"), 756e12),
    (("H100",), 989e12),
    (("H800", "PCIE"), 756e12),
    (("H800",), 989e12),
    (("H20",), 148e12),
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("A30",), 165e12),
    (("A40",), 149.7e12),
    (("A10",), 125e12),
    (("L40S",), 362e12),
    (("L40",), 181e12),
    (("L4",), 121e12),
)


def peak_bfloat16_flops(gpu: str) -> float | None:
    """Return the peak of a GPU by the name that CUDA gives it, or None where the table has none.

    A part of a GPU (MIG) has none.

    Example: "NVIDIA H100 80GB HBM3" -> 989e12, "NVIDIA H100 PCIe" -> 756e12.
    """
    words = set(re.split(r"[^A-Z0-9]+", gpu.upper()))
    if "MIG" in words:
        return None
    return next((peak for names, peak in PEAK_BFLOAT16 if words.issuperset(names)), None)
