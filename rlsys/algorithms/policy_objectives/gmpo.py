"""Geometric-mean policy optimization (GMPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.bounded_ratio import bounded_ratio
from rlsys.algorithms.policy_objectives.weights import (
    Surrogate,
    TokenTerms,
    check_width,
    register_weight,
)


def _validate(*, clip_low: float, clip_high: float) -> None:
    check_width("clip_low", clip_low)
    check_width("clip_high", clip_high)


@register_weight(
    "gmpo",
    levels=("token",),
    validate=_validate,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def gmpo_weight(terms: TokenTerms, *, clip_low: float = 0.4, clip_high: float = 0.4) -> Surrogate:
    """Return the geometric mean of a response's clipped ratios, times A.

        s = exp(1/|y| sum_t c_t)     c_t = min(d_t, clip_high) where A > 0, max(d_t, -clip_low) else
        L_t = s A,  d L_t / d log pi_t = s A where d_t is not clipped, else 0

    d_t is the log-ratio of a token. Unlike GSPO, which clips the mean, each token is clipped by
    itself, so a few tokens with large ratios neither move the mean far nor cost the others their
    gradient. With `sequence_mean` the loss and its gradient are those of s A per response.

    Source: Zhao et al. 2025, Geometric-Mean Policy Optimization, equation 4 (arXiv:2507.20673), and
    verl's loss mode `geo_mean`.

    Shapes: [B, T].

    Conventions: `clip_low` and `clip_high` are widths in log space: 0.4 is the paper's range
    (e^-0.4, e^0.4), wider than PPO's. Like the sequence ratio here, each token's surrogate has a
    gradient for that token alone, so advantages may differ within a response; where they are equal
    it is the paper's gradient. It is defined for the ratio level `token`.

    Raises:
        ValueError: a width below 0.
    """
    _validate(clip_low=clip_low, clip_high=clip_high)
    logs, advantages = terms.log_ratios, terms.advantages
    too_high = (advantages > 0) & (logs > clip_high)
    too_low = (advantages < 0) & (logs < -clip_low)

    clipped = torch.where(too_high, clip_high, torch.where(too_low, -clip_low, logs))
    mean = _response_mean(clipped.detach(), terms.mask)
    # The value of the mean, with the gradient of the token's own clipped log-ratio.
    ratio = bounded_ratio(mean + clipped - clipped.detach())
    return Surrogate(ratio * advantages, too_high | too_low)


def _response_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return [B, T] the mean over the masked tokens of each response."""
    total = torch.where(mask, values, 0.0).sum(1, keepdim=True)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(values)
