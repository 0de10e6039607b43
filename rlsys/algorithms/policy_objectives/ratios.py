"""Ratio levels: the log-ratio of live and old policy that a weight function gets at each token.

With d_t = logprobs_t - old_logprobs_t and |y| the tokens of the response:

    token       d_t
    sequence    1/|y| sum_s d_s                   geometric mean over the response (GSPO)
    future      1/|y_{>=t}| sum_{s>=t} d_s        geometric mean from t on
    prefix      sum_{s<=t} d_s                    product up to t
    product     sum_s d_s                         product over the response

All are in log space. The gradient of every level goes through the token's own log-probability
alone, as in GSPO-token (Zheng et al. 2025, section 4.3, arXiv:2507.18071), so that each token's
surrogate has a gradient for that token alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlsys.registry import Registry

RatioFunction = Callable[[Tensor, Tensor], Tensor]
RATIOS: Registry[RatioFunction] = Registry("ratio")


def register_ratio(name: str) -> Callable[[RatioFunction], RatioFunction]:
    """Register `function(log_differences, mask) -> log_ratios`, all [B, T], as a level (decorator).

    The differences are 0 outside the mask.
    """
    return RATIOS.register(name)


@register_ratio("token")
def token_log_ratio(differences: Tensor, mask: Tensor) -> Tensor:
    """Return d_t."""
    return differences


@register_ratio("sequence")
def sequence_log_ratio(differences: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of d over the response; gradient through d_t alone."""
    mean = differences.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.detach() + differences - differences.detach()


@register_ratio("future")
def future_log_ratio(differences: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of d from t to the end; gradient through d_t alone."""
    remaining = mask.flip(1).cumsum(1).flip(1).clamp(min=1)
    mean = differences.flip(1).cumsum(1).flip(1) / remaining
    return mean.detach() + differences - differences.detach()


@register_ratio("prefix")
def prefix_log_ratio(differences: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of d up to and including t; gradient through d_t alone."""
    total = differences.cumsum(1)
    return total.detach() + differences - differences.detach()


@register_ratio("product")
def product_log_ratio(differences: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of d over the response; gradient through d_t alone."""
    total = differences.sum(1, keepdim=True).expand_as(differences)
    return total.detach() + differences - differences.detach()


def log_ratios(level: str, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the log-ratios of one level, [B, T] float32 or better, 0 outside the mask."""
    function = RATIOS.get(level, field="algorithm.objective.ratio")
    differences = torch.where(mask, logprobs - old_logprobs, 0.0)
    return torch.where(mask, function(differences, mask), 0.0)


def importance_variances(tokens: int, drift: float = 0.6) -> tuple[float, float]:
    """Compute the variances of the product and of the geometric mean of token ratios.

    The `tokens` tokens are independent, over a vocabulary of two. The old policy gives both the
    same probability; the live one has the first one's logit raised by `drift`. The result is exact,
    because the count of the first one is binomial.
    """
    logs = torch.tensor([drift, 0.0], dtype=torch.float64).log_softmax(0) + math.log(2.0)
    counts = torch.arange(tokens + 1, dtype=torch.float64)
    rest = tokens - counts
    log_choices = math.lgamma(tokens + 1) - torch.lgamma(counts + 1) - torch.lgamma(rest + 1)
    probabilities = (log_choices - tokens * math.log(2.0)).exp()
    total = counts * logs[0] + rest * logs[1]

    def variance(weights: Tensor) -> float:
        mean = (probabilities * weights).sum()
        return float((probabilities * (weights - mean) ** 2).sum())

    return variance(total.exp()), variance((total / tokens).exp())
