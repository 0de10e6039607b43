"""The optimal baseline of each position."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, at_least_float32, leaves_one_out
from rlsys.algorithms.advantages.returns import suffix_sum


@register_advantage_estimator(
    "optimal_token_baseline",
    needs=("squared_score_norms",),
    compares_group=True,
    unbiased=leaves_one_out,
)
def optimal_token_baseline_advantages(
    inputs: AdvantageInputs, *, leave_one_out: bool = False
) -> AdvantageOutput:
    """Return the reward-to-go minus a baseline for each position of the group.

        b_t = sum_i G_it W_it / sum_i W_it,    A_it = G_it - b_t
        W_it = sum_{s <= t} ||grad log pi(y_is)||^2

    W_t is the sum of squared score norms up to token t ("energy"): a response of which the policy
    was uncertain counts for more.

    Source: the optimal token baseline of verl (`compute_optimal_token_baseline_advantage`,
    arXiv:2602.07078); the constant one is Greensmith et al. 2004.

    Shapes: rewards [B], token_rewards [B, T] or None, squared_score_norms [B, T] -> advantages
    [B, T].

    Conventions: sums at t are over the responses of the group that sampled a token at t. b_t
    contains response i; with `leave_one_out` it does not, and the gradient is unbiased. A response
    that is alone at its position (the tail of the longest one) is always left out: its baseline
    there is that of the group's other responses, which have ended, with all of their energy and
    their outcome. verl gives such a tail 0, or its whole return with `handle_zero_tail`; it gives a
    group of one its return, which gets exactly 0 here, as do equal returns. Where all W are 0 the
    plain mean is used; verl adds 1e-8 to the sum of W instead.

    Example: a group of rewards (1, 0), squared_score_norms ((1, 1), (1, 3)): W = ((1, 2), (1, 4)),
    b = (1/2, 1/3), A = ((1/2, 2/3), (-1/2, -1/3)). A third token of the first response alone: b =
    0, the return of the other response, and A = 1.
    """
    norms = inputs.squared_score_norms
    assert norms is not None, "squared_score_norms are declared in `needs`"
    mask = inputs.response_mask
    groups = Groups.of(inputs.group_ids)
    returns = _returns(inputs)
    energy = torch.where(mask, norms, 0.0).double().cumsum(1)

    together = _above_baseline(returns, energy, mask, groups, leave_one_out)
    tail = _above_baseline(returns, energy, torch.ones_like(mask), groups, leave_one_out=True)
    accompanied = groups.others_total(mask) > 0
    advantages = torch.where(accompanied, together, tail)

    alone = (groups.spread(groups.counts) == 1)[:, None]
    advantages = torch.where(mask & ~alone, advantages, 0.0)
    return AdvantageOutput(advantages=advantages.to(at_least_float32(inputs.rewards).dtype))


def _returns(inputs: AdvantageInputs) -> Tensor:
    """Return [B, T] float64 the outcome plus the process rewards from t on.

    After a response's end it is the outcome alone.
    """
    outcome = inputs.rewards.double()[:, None].expand(inputs.response_mask.shape)
    if inputs.token_rewards is None:
        return outcome

    process = torch.where(inputs.response_mask, inputs.token_rewards, 0.0)
    return outcome + suffix_sum(process.double())


def _above_baseline(
    returns: Tensor, energy: Tensor, members: Tensor, groups: Groups, leave_one_out: bool
) -> Tensor:
    """Return [B, T] G - sum_j G_j W_j / sum_j W_j over the group's `members` at each position.

    With `leave_one_out` the sums leave out the response itself. Shapes: all [B, T].
    """
    # Less the smallest return at the position, so that equal ones cancel exactly.
    lowest = groups.extreme(torch.where(members, returns, torch.inf), "amin")
    above = torch.where(members, returns - groups.spread(lowest), 0.0)

    def over_group(values: Tensor) -> Tensor:
        if leave_one_out:
            return groups.others_total(values)
        return groups.spread(groups.total(values))

    weights = torch.where(members, energy, 0.0)
    total = over_group(weights)
    number = over_group(members.double())
    weighted = over_group(weights * above) / torch.where(total > 0, total, 1.0)
    plain = over_group(above) / number.clamp(min=1)
    return above - torch.where(total > 0, weighted, plain)
