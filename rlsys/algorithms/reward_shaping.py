"""Outcome rewards, changed by what the response looks like rather than by what it says."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_overlong_penalty(lengths: Tensor, *, max_tokens: int, buffer_tokens: int, penalty: float = 1.0) -> Tensor:
    """[B] A penalty that grows linearly over the last `buffer_tokens` before the limit.

        0                                              L <= max_tokens - buffer
        (max_tokens - buffer - L) / buffer * penalty   in between
        -penalty                                       L >= max_tokens

    Source: Yu et al. 2025, DAPO, equation 13 (arXiv:2503.14476).

    Example: max_tokens 20, buffer 5: lengths 15, 17, 20 get 0, -0.4, -1.

    Raises:
        ValueError: the buffer is not within the limit.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(
            f"algorithm.overlong.buffer_tokens: {buffer_tokens} must be above 0 and at most generation.max_tokens ({max_tokens})"
        )
    excess = (lengths.to(torch.float32) - (max_tokens - buffer_tokens)) / buffer_tokens
    return -penalty * excess.clamp(0, 1)
