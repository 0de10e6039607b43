"""The loss of a value function (critic), and how much of the returns it explains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlsys.algorithms.advantages.grouping import at_least_float32


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = None
) -> Tensor:
    """Return [B, T] the loss of each value, not reduced.

        without clip    1/2 (V - R)^2
        with clip c     1/2 max((V - R)^2, (V_clip - R)^2),    V_clip = V_old + clamp(V - V_old, c)

    A value that has moved towards its target by more than c has no gradient; one that has moved
    away from it keeps the whole gradient.

    Source: Schulman et al. 2017 (arXiv:1707.06347), section 5, for the squared error; the clip is
    that of OpenAI baselines' PPO2 (ppo2/model.py).

    Shapes: [B, T] each -> [B, T], in at least float32.

    Conventions: the factor 1/2, as in PPO2; a coefficient of the value loss is the caller's, and a
    critic with an optimizer of its own needs none. `clip` is in units of the returns. Where V has
    not moved, both terms are equal, and so is the gradient. Gradient flows to `values` alone. The
    function knows no mask: aggregate the result with one.

    Example: V = 1, V_old = 0, R = 1 and clip = 0.2 give 1/2 max(0, 0.8^2) = 0.32, without a
    gradient.

    Raises:
        ValueError: shapes that differ, or a clip that is not above 0.
    """
    if not values.shape == old_values.shape == returns.shape:
        raise ValueError(
            f"values {tuple(values.shape)}, old_values {tuple(old_values.shape)} and returns "
            f"{tuple(returns.shape)} must have one shape"
        )
    values = at_least_float32(values)
    returns = at_least_float32(returns).detach()
    squared = (values - returns) ** 2
    if clip is None:
        return squared / 2

    clipped = _clipped(values, at_least_float32(old_values).detach(), clip)
    return torch.maximum(squared, (clipped - returns) ** 2) / 2


def value_is_clipped(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = None
) -> Tensor:
    """Return [B, T] bool, true where `value_loss` has no gradient because of its clip.

    That is where the clipped error is the larger one. False everywhere without a clip.
    """
    if clip is None:
        return torch.zeros_like(values, dtype=torch.bool)
    clipped = _clipped(at_least_float32(values), at_least_float32(old_values), clip)
    return (clipped - returns) ** 2 > (values - returns) ** 2


def _clipped(values: Tensor, old_values: Tensor, clip: float) -> Tensor:
    if not clip > 0:
        raise ValueError(
            f"clip: {clip} is not above 0, so no value could move. Give a number in units of the "
            "returns, such as 0.2, or None for no clip."
        )
    # Not old + clamp(V - old), which inside the range differs from V by rounding.
    return values.clamp(old_values - clip, old_values + clip)


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> float:
    """Return the fraction of the variance of the returns that the values explain.

        1 - Var(R - V) / Var(R)

    1: the values are right up to a constant; 0: no better than a constant; below 0: worse.

    Source: OpenAI baselines, common/math_util.py, as in most implementations of PPO.

    Shapes: [B, T] each; over the tokens of the mask.

    Conventions: variances with ddof 0. A constant error does not count: Var is about the mean. NaN
    where all returns are equal, or where there are none. With lambda below 1 in GAE the returns
    contain the values themselves, which raises the number.

    Example: returns (0, 1), values (0, 0.5): Var(0, 0.5) = 1/16, Var(0, 1) = 1/4, hence 3/4.

    Raises:
        ValueError: shapes that differ.
    """
    if not values.shape == returns.shape == response_mask.shape:
        raise ValueError(
            f"values {tuple(values.shape)}, returns {tuple(returns.shape)} and response_mask "
            f"{tuple(response_mask.shape)} must have one shape"
        )
    targets = returns[response_mask].double()
    if not len(targets) or bool(targets.max() == targets.min()):
        return math.nan
    errors = targets - values[response_mask].double()
    return 1 - float(errors.var(correction=0) / targets.var(correction=0))
