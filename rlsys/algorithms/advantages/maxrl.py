"""Maximum-likelihood reinforcement learning (MaxRL)."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, at_least_float32, broadcast_to_tokens
from rlsys.algorithms.advantages.outcome_only import (
    check_outcome_only,
    check_reward_range,
    refuse_token_costs,
)

NAME = "maxrl"


@register_advantage_estimator(
    "maxrl", compares_group=True, step_rewards="refused", check=refuse_token_costs(NAME)
)
def maxrl_advantages(inputs: AdvantageInputs) -> AdvantageOutput:
    """Return the reward of a response relative to its group, divided by the group's mean.

        A_i = (r_i - mean(r)) / mean(r)        mean over the group of i

    For rewards of 0 and 1 it ascends the log of the success probability p of each prompt instead
    of p itself, up to an order that the group size sets:

        log p = - sum_k (1 - p)^k / k,        E[1/G sum_i A_i grad log pi] = grad J_{G-1}
        J_T = sum_{k=1..T} pass@k / k,        pass@k = 1 - (1 - p)^k

    So a prompt counts by about 1/p, more than in GRPO, where it counts by 1/sqrt(p (1 - p)).

    Source: Tajwar et al. 2026, Maximum Likelihood Reinforcement Learning, algorithm 1
    (arXiv:2602.02710); TRL's MaxRLTrainer.

    Shapes: rewards [B], response_mask [B, T] -> advantages [B, T].

    Conventions: rewards must be at least 0; the likelihood is that of rewards of 0 and 1. A group
    without any reward gets exactly 0, as do a group of one and a group of equal rewards; because
    the baseline is left out there too, the order is G - 1 where the paper's estimator without a
    baseline has G. No epsilon is added to the mean. Process rewards are refused.

    Example: rewards (1, 0, 0, 0): mean 1/4, advantages (3, -1, -1, -1).

    Raises:
        ValueError: a reward below 0, or process rewards.
    """
    check_outcome_only(inputs, NAME)
    rewards = at_least_float32(inputs.rewards)
    remedy = "Give the reward functions weights with which the sum is at least 0."
    check_reward_range(rewards, 0.0, float("inf"), NAME, remedy)

    groups = Groups.of(inputs.group_ids)
    mean = groups.spread(groups.total(rewards) / groups.counts)
    idle = groups.all_equal(rewards) | (mean <= 0)
    advantages = torch.where(idle, 0.0, (rewards - mean) / torch.where(idle, 1.0, mean))
    return AdvantageOutput(advantages=broadcast_to_tokens(advantages, inputs.response_mask))
