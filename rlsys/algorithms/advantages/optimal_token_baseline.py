"""The optimal baseline of each position."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages.grouping import Groups, at_least_float32
from rlsys.algorithms.advantages.inputs import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.returns import reward_to_go


@register_advantage_estimator("optimal_token_baseline", needs=("score_norms",), compares_group=True)
def optimal_token_baseline_advantages(inputs: AdvantageInputs) -> AdvantageOutput:
    """The reward-to-go minus a baseline for each position of the group.

        b_t = sum_i G_it W_it / sum_i W_it,    W_it = sum_{s <= t} ||grad log pi(y_is)||^2,    A_it = G_it - b_t

    W_t is the gradient's energy that has accumulated when token t is reached: a response that the policy was unsure of counts for
    more.

    Source: the optimal token baseline of verl (`optimal_token_baseline`); the constant one is Greensmith et al. 2004.

    Shapes: rewards [B], token_rewards [B, T] or None, score_norms [B, T] -> advantages [B, T].

    Conventions: sums at t are over the responses of the group that sampled a token at t. b_t contains response i. Alone at its
    position, or among equal returns, a response gets exactly 0. Where all W are 0 the plain mean stands in.

    Example: a group of rewards (1, 0), score_norms ((1, 1), (1, 3)): W = ((1, 2), (1, 4)), b = (1/2, 1/3), A = ((1/2, 2/3), (-1/2,
    -1/3)).

    Raises:
        ValueError: no score_norms.
    """
    norms = inputs.require(
        "score_norms",
        estimator="optimal_token_baseline",
        remedy="The policy computes them with old_logprobs.",
    )
    mask, groups = inputs.response_mask, Groups.of(inputs.group_ids)
    returns = reward_to_go(inputs.rewards, inputs.token_rewards, mask)
    # Measured from the smallest return at the position, so that equal ones cancel exactly.
    lowest = groups.extreme(torch.where(mask, returns, torch.inf), "amin")
    returns = torch.where(mask, returns - groups.spread(lowest), 0.0)
    energy = torch.where(mask, torch.where(mask, at_least_float32(norms), 0.0).cumsum(1), 0.0)
    energy = torch.where(groups.spread(groups.total(energy)) > 0, energy, mask.to(energy.dtype))
    total = groups.total(energy)
    baseline = groups.total(energy * returns) / torch.where(total > 0, total, 1.0)
    return AdvantageOutput(advantages=torch.where(mask, returns - groups.spread(baseline), 0.0))
