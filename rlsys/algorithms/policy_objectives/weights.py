"""Weight functions: the surrogate L(rho, A) that an update maximises at each token.

A weight takes log-ratios, advantages and log-probabilities, all [B, T], and returns the surrogate (to be maximised) and a bool tensor of the
tokens whose gradient it cut.

    none         log pi * A                                 score function, no ratio
    importance   rho A
    ppo_clip     min(rho A, clip(rho, 1-low, 1+high) A)
    dual_clip    ppo_clip, and at least c A where A < 0
    cispo        stop(clip(rho, 1-low, 1+high)) log pi * A
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlsys.registry import Registry

# Beyond e^20 a ratio says only "gone"; clamping in log space keeps float32 finite. Ratios that large are cut by every clipped weight.
MAX_LOG_RATIO = 20.0


class Surrogate(NamedTuple):
    """What is maximised, and where the weight cut the gradient."""

    values: Tensor  # [B, T]
    clipped: Tensor  # [B, T] bool


WeightFunction = Callable[..., Surrogate]
WEIGHTS: Registry[WeightFunction] = Registry("weight")


def register_weight(name: str) -> Callable[[WeightFunction], WeightFunction]:
    """Decorator: `function(log_ratios, advantages, logprobs, *, keywords...) -> Surrogate`."""
    return WEIGHTS.register(name)


def _ratio(log_ratios: Tensor) -> Tensor:
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _check_band(clip_low: float, clip_high: float) -> None:
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if value < 0 or (name == "clip_low" and value > 1):
            raise ValueError(
                f"algorithm.objective.parameters.{name}: {value} is outside [0, 1]"
                if name == "clip_low"
                else f"algorithm.objective.parameters.{name}: {value} is negative; give a width such as 0.2"
            )


@register_weight("none")
def no_weight(log_ratios: Tensor, advantages: Tensor, logprobs: Tensor) -> Surrogate:
    """log pi * A: the score-function estimator, whatever the ratio."""
    return Surrogate(logprobs * advantages, torch.zeros_like(advantages, dtype=torch.bool))


@register_weight("importance")
def importance_weight(log_ratios: Tensor, advantages: Tensor, logprobs: Tensor) -> Surrogate:
    """rho A: importance sampling without a trust region."""
    return Surrogate(_ratio(log_ratios) * advantages, torch.zeros_like(advantages, dtype=torch.bool))


@register_weight("ppo_clip")
def ppo_clip_weight(
    log_ratios: Tensor, advantages: Tensor, logprobs: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Surrogate:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A): no gradient once the ratio has gone far enough in A's direction.

    Source: Schulman et al. 2017, equation 7 (arXiv:1707.06347); different bounds: Yu et al. 2025, Clip-Higher (arXiv:2503.14476).
    """
    _check_band(clip_low, clip_high)
    ratio = _ratio(log_ratios)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    cut = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    return Surrogate(torch.minimum(ratio * advantages, clipped * advantages), cut)


@register_weight("dual_clip")
def dual_clip_weight(
    log_ratios: Tensor, advantages: Tensor, logprobs: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2, clip_c: float = 3.0
) -> Surrogate:
    """ppo_clip, bounded below by c A for negative advantages, so that a ratio far above 1 cannot make the loss explode.

    Source: Ye et al. 2020, equation 5 (arXiv:1912.09729).

    Raises:
        ValueError: clip_c is at most 1.
    """
    if clip_c <= 1:
        raise ValueError(f"algorithm.objective.parameters.clip_c: {clip_c} must be above 1")
    surrogate, cut = ppo_clip_weight(log_ratios, advantages, logprobs, clip_low=clip_low, clip_high=clip_high)
    floor = clip_c * advantages
    negative = advantages < 0
    return Surrogate(torch.where(negative, torch.maximum(surrogate, floor), surrogate), cut | (negative & (surrogate < floor)))


@register_weight("cispo")
def cispo_weight(
    log_ratios: Tensor, advantages: Tensor, logprobs: Tensor, *, clip_low: float = 1.0, clip_high: float = 0.2
) -> Surrogate:
    """stop(clip(rho)) log pi * A: every token keeps a gradient, its weight is bounded.

    Source: MiniMax 2025, MiniMax-M1, section 3.1 (arXiv:2506.13585).
    """
    _check_band(clip_low, clip_high)
    weight = _ratio(log_ratios).clamp(1 - clip_low, 1 + clip_high).detach()
    return Surrogate(weight * logprobs * advantages, torch.zeros_like(advantages, dtype=torch.bool))
