"""REINFORCE with a leave-one-out baseline (RLOO)."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, broadcast_to_tokens, outcome_rewards


@register_advantage_estimator("rloo", compares_group=True, unbiased=True)
def rloo_advantages(inputs: AdvantageInputs) -> AdvantageOutput:
    """Return the reward of a response minus the mean reward of the other responses.

        A_i = r_i - 1/(G-1) sum_{j != i} r_j = G/(G-1) (r_i - mean(r))

    The baseline does not depend on response i, so the policy gradient stays unbiased.

    Source: Kool et al. 2019, Buy 4 REINFORCE Samples, Get a Baseline for Free; Ahmadian et al.
    2024, Back to Basics, section 4.2 (arXiv:2402.14740).

    Shapes: rewards [B], response_mask [B, T] -> advantages [B, T].

    Conventions: a group of one has no other responses and gets exactly 0, as does a group of equal
    rewards. Process rewards, where present, are summed into the outcome.

    Example: rewards (1, 0, 0): leave-one-out baselines (0, 1/2, 1/2), advantages (1, -1/2, -1/2).
    """
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask)
    groups = Groups.of(inputs.group_ids)
    others = (groups.counts - 1).clamp(min=1)
    baseline = (groups.spread(groups.total(rewards)) - rewards) / groups.spread(others)
    advantages = torch.where(groups.all_equal(rewards), 0.0, rewards - baseline)
    return AdvantageOutput(advantages=broadcast_to_tokens(advantages, inputs.response_mask))
