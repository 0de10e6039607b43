"""Probability ratios and log-probabilities that stay finite: the value is capped, the gradient is not lost."""

from __future__ import annotations

from torch import Tensor

# Beyond e^20 a ratio says only "gone"; capping in log space keeps float32 finite.
MAX_LOG_RATIO = 20.0
# What a word counts that a model rules out. A difference of two such words is 0 then, and not a NaN.
MIN_LOGPROB = -1e4


def bounded_ratio(log_ratios: Tensor) -> Tensor:
    """Compute exp(x) with x capped to [-20, 20], and d/dx exp(x) = exp(x) at the capped value: beyond the cap a token still has a gradient.

    Shapes: any, elementwise.

    Conventions: `torch.clamp` alone would give such a token the gradient 0, as if an objective had clipped it.
    """
    capped = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratios + (capped - log_ratios).detach()).exp()


def finite_logprobs(logprobs: Tensor) -> Tensor:
    """Cap log-probabilities from below at -10,000, for those of a model without gradient: -inf is a word that it rules out."""
    return logprobs.clamp(min=MIN_LOGPROB)
