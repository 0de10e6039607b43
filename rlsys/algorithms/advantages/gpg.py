"""Group policy gradient (GPG)."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, broadcast_to_tokens, outcome_rewards


@register_advantage_estimator("gpg", compares_group=True)
def gpg_advantages(inputs: AdvantageInputs) -> AdvantageOutput:
    """Return the reward less the group's mean, scaled up for the responses without a gradient.

        A_i = alpha (r_i - mean(r)),    alpha = B / (B - M)

    B counts the responses of the batch, and M those of them whose group has equal rewards (all
    right or all wrong). They contribute 0, so an average over B would shrink the gradient by their
    fraction. With alpha it is the average over the remaining responses.

    Source: Chu et al. 2025, GPG, accurate gradient estimation (arXiv:2504.02546), with F_norm = 1:
    no division by the deviation.

    Shapes: rewards [B], response_mask [B, T] -> advantages [B, T].

    Conventions: the batch is all responses of a step, before it is split into mini-batches. M
    counts responses of groups with equal rewards; verl counts rewards that are 0 instead, in groups
    with a gradient too. The paper also samples again until the fraction of groups with a gradient
    is large enough: `algorithm.dynamic_sampling`. With one group the expected gradient is 1 - 1/G
    of the true one; with several, alpha depends on the rewards that it multiplies, so a prompt with
    different rewards counts for more when the other prompts of the batch have equal ones. A group
    of one, or of equal rewards, gets exactly 0. Process rewards, where present, are summed into the
    outcome.

    Example: groups of rewards (1, 0) and (1, 1): B = 4, M = 2, alpha = 2, advantages (1, -1, 0, 0).
    """
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask)
    groups = Groups.of(inputs.group_ids)
    centred = rewards - groups.spread(groups.total(rewards) / groups.counts)

    all_equal = groups.all_equal(rewards)
    with_gradient = int((~all_equal).sum())
    alpha = len(rewards) / max(with_gradient, 1)
    advantages = torch.where(all_equal, 0.0, alpha * centred)
    return AdvantageOutput(
        advantages=broadcast_to_tokens(advantages, inputs.response_mask),
        diagnostics={"alpha": alpha if with_gradient else 1.0},
    )
