"""On-policy RL with optimal baseline (OPO): response length in place of the squared gradient."""

from __future__ import annotations

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, broadcast_to_tokens, outcome_rewards
from rlsys.algorithms.advantages.optimal_baseline import rewards_above_baseline


@register_advantage_estimator("opo", compares_group=True)
def opo_advantages(inputs: AdvantageInputs) -> AdvantageOutput:
    """Return the reward minus the group's average weighted by length.

        b = sum_i L_i r_i / sum_i L_i,    A_i = r_i - b

    b is the optimal baseline when the squared gradient of a response is proportional to its length.

    Source: Hao et al. 2025, On-Policy RL with Optimal Reward Baseline, equation 9
    (arXiv:2505.23585).

    Shapes: rewards [B], response_mask [B, T] -> advantages [B, T].

    Conventions: L counts the mask. b contains response i, as published. A group of one or of equal
    rewards gets exactly 0.

    Example: rewards (1, 0), lengths (1, 3): b = 1/4, advantages (3/4, -1/4).
    """
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask)
    lengths = inputs.response_mask.sum(1).to(rewards.dtype)
    advantages = rewards_above_baseline(rewards, lengths, Groups.of(inputs.group_ids))
    return AdvantageOutput(advantages=broadcast_to_tokens(advantages, inputs.response_mask))
