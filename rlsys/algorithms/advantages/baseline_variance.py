"""Estimated variance of the policy gradient under different baselines, and what tells whether the ratios can be trusted."""

from __future__ import annotations

from rlsys.algorithms.advantages.hierarchical_fits import GroupedBatch
from torch import Tensor


def baseline_diagnostics(batch: GroupedBatch, weight: Tensor, norms: Tensor, rewards: Tensor) -> dict[str, float]:
    return {}
