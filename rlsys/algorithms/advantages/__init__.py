"""Advantage estimators: one a file, found by name."""

from rlsys.algorithms.advantages.grpo import grpo_advantages
from rlsys.algorithms.advantages.hierarchical import hierarchical_advantages
from rlsys.algorithms.advantages.inputs import (
    AdvantageEstimator,
    AdvantageInputs,
    AdvantageOutput,
    available_advantage_estimators,
    get_advantage_estimator,
    needs_old_logprobs,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.reinforce import reinforce_advantages
from rlsys.algorithms.advantages.rloo import rloo_advantages

__all__ = [
    "AdvantageEstimator",
    "AdvantageInputs",
    "AdvantageOutput",
    "available_advantage_estimators",
    "get_advantage_estimator",
    "grpo_advantages",
    "hierarchical_advantages",
    "needs_old_logprobs",
    "register_advantage_estimator",
    "reinforce_advantages",
    "rloo_advantages",
]
