"""The learning rate of each trainer step."""

from __future__ import annotations

import math

from rlsys.config import OptimizerConfig


def learning_rate(
    optimizer: OptimizerConfig, step: float, total_steps: int, *, width: float = 1.0
) -> float:
    """Return the learning rate of trainer step `step` (counted from 0) out of `total_steps`.

    An update that is a part of a trainer step begins at a fraction, such as 2.5 for the second of
    two updates, and has a `width` below 1, such as 0.5.

        warm-up    peak (step + width) / warmup_steps
        linear     peak (m + (1 - m) (1 - x)),        m = minimum_ratio
        cosine     peak (m + (1 - m) (1 + cos(pi x)) / 2)

    x is the fraction of the steps after the warm-up that are done: 0 in the first of them, 1 after
    the last. So the minimum is reached after the last step, and with m = 0 the last step still
    trains.

    Example: linear over 4 steps to 0: 1, 3/4, 1/2, 1/4 of the peak.
    """
    peak = optimizer.learning_rate
    floor = optimizer.minimum_ratio

    if step < optimizer.warmup_steps:
        return peak * min(1.0, (step + width) / optimizer.warmup_steps)
    if optimizer.schedule == "constant":
        return peak

    span = max(1, total_steps - optimizer.warmup_steps)
    progress = min(1.0, (step - optimizer.warmup_steps) / span)
    linear = 1 - progress
    cosine = (1 + math.cos(math.pi * progress)) / 2
    falling = linear if optimizer.schedule == "linear" else cosine
    return peak * (floor + (1 - floor) * falling)
