"""Probability ratios and log-probabilities that stay finite without losing their gradient."""

from __future__ import annotations

from torch import Tensor

# The size of a ratio beyond e^20 carries no information; a cap in log space keeps float32 finite.
MAX_LOG_RATIO = 20.0
# The log-probability of tokens of probability 0. The difference of two of them is 0, not NaN.
MIN_LOGPROB = -1e4


def bounded_ratio(log_ratios: Tensor) -> Tensor:
    """Compute exp(x) with x capped to [-20, 20], with a gradient beyond the cap too.

    The gradient is d/dx exp(x) = exp(x) at the capped value.

    Shapes: any, elementwise.

    Conventions: `torch.clamp` alone would give a token beyond the cap the gradient 0, as if an
    objective had clipped it.
    """
    capped = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratios + (capped - log_ratios).detach()).exp()


def finite_logprobs(logprobs: Tensor) -> Tensor:
    """Cap log-probabilities from below at -10,000, for those of a model without gradient.

    A model gives -inf to a token of probability 0.
    """
    return logprobs.clamp(min=MIN_LOGPROB)
