"""The learning rate of each trainer step."""

from __future__ import annotations

import math

from rlsys.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of trainer step `step` (counted from 0) out of `total_steps`.

    warm-up    peak (step + 1) / warmup_steps
    linear     peak (m + (1 - m) (1 - x)),        x from 0 after the warm-up to 1 at the last step, m = minimum_ratio
    cosine     peak (m + (1 - m) (1 + cos(pi x)) / 2)
    """
    peak, floor = optimizer.learning_rate, optimizer.minimum_ratio
    if step < optimizer.warmup_steps:
        return peak * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return peak
    span = max(1, total_steps - 1 - optimizer.warmup_steps)
    progress = min(1.0, (step - optimizer.warmup_steps) / span)
    falling = (
        1 - progress if optimizer.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    )
    return peak * (floor + (1 - floor) * falling)
