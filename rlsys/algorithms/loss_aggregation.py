"""Aggregation of token losses to one number."""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATION_MODES = ("token_mean", "sequence_mean", "sequence_sum", "constant")


def aggregate_loss(
    token_losses: Tensor,
    response_mask: Tensor,
    mode: str,
    *,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """Reduce [B, T] token losses to a scalar.

        token_mean      sum_it l_it / num_tokens                     DAPO: tokens count alike
        sequence_mean   sum_i (sum_t l_it / L_i) / num_sequences     GRPO: responses count alike
        sequence_sum    sum_it l_it / num_sequences                  gradient of the sequence
        constant        sum_it l_it / (num_sequences * max_tokens)   Dr. GRPO: no length bias

    Source: Shao et al. 2024 (GRPO), Yu et al. 2025 section 3.3 (DAPO, arXiv:2503.14476), Liu et al.
    2025 section 3.1 (Dr. GRPO).

    Shapes: token_losses [B, T], response_mask [B, T] bool -> scalar.

    Conventions: the denominators are those of the whole mini-batch over all ranks, passed in, so
    that losses of microbatches ADD UP to the loss of the mini-batch; None counts this tensor's own.
    A response without tokens contributes 0 to the numerator. L_i counts the mask.

    Raises:
        ValueError: unknown mode, or `constant` without max_tokens.
    """
    if mode not in AGGREGATION_MODES:
        raise ValueError(
            f"algorithm.aggregation: unknown mode {mode!r}. Choose from "
            f"{', '.join(AGGREGATION_MODES)}."
        )

    losses = torch.where(response_mask, token_losses, 0.0)
    sequences = float(len(response_mask)) if num_sequences is None else num_sequences

    if mode == "token_mean":
        tokens = response_mask.sum() if num_tokens is None else num_tokens
        return losses.sum() / tokens
    if mode == "sequence_mean":
        lengths = response_mask.sum(dim=1).clamp(min=1)
        return (losses.sum(dim=1) / lengths).sum() / sequences
    if mode == "sequence_sum":
        return losses.sum() / sequences
    if max_tokens is None:
        raise ValueError(
            "aggregation mode 'constant' needs max_tokens, the generation length that divides the "
            "sum of every response"
        )
    return losses.sum() / (sequences * max_tokens)
