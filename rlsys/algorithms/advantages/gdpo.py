"""Group reward-decoupled normalization (GDPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, at_least_float32, broadcast_to_tokens
from rlsys.algorithms.advantages.outcome_only import check_outcome_only, refuse_token_costs
from rlsys.algorithms.advantages.returns import check_eps, check_std_ddof

NAME = "gdpo"


def _validate(*, std_ddof: int, eps: float) -> None:
    check_std_ddof(std_ddof)
    check_eps(eps)


@register_advantage_estimator(
    "gdpo",
    needs=("reward_components",),
    compares_group=True,
    step_rewards="refused",
    validate=_validate,
    check=refuse_token_costs(NAME),
)
def gdpo_advantages(
    inputs: AdvantageInputs, *, std_ddof: int = 0, eps: float = 1e-6
) -> AdvantageOutput:
    """Return the weighted sum of the normalised rewards of each function.

        A_ik = (r_ik - mean(r_k)) / (std(r_k) + eps)        mean and std over the group of i
        S_i  = sum_k w_k A_ik
        A_i  = S_i / (std(S) + eps)                         std over the batch

    r_ik is what reward function k gave to response i, and w_k its weight. GRPO normalises the sum
    of the rewards, so that responses with the same sum get the same advantage, and a function with
    a small spread hardly counts. Here each function counts by its weight alone.

    Source: Liu et al. 2026, GDPO: Group reward-Decoupled Normalization Policy Optimization for
    Multi-reward RL Optimization, section 3 (arXiv:2601.05242); TRL's
    `multi_objective_aggregation: normalize_then_sum`.

    Shapes: reward_components [B, K], reward_weights [K] or None -> advantages [B, T].

    Conventions: `std_ddof` 0 divides squares by the number of responses, 1 by one less (TRL), both
    in the group and in the batch; `eps` is added to the standard deviation (TRL: 1e-4). The paper
    subtracts the mean of S over the batch as well, which is 0, because each A_k has mean 0 in its
    group. A function that failed on a response (NaN) contributes 0 there, and the response does not
    count in the mean and std of that function. A function with equal rewards in a group, and a
    group of one, get exactly 0. With one reward function it is GRPO divided by the deviation of the
    batch. Process rewards are refused.

    Example: one group, rewards (1, 0) and (0, 1) of two functions of weights 2 and 1:
    A_1 = (1, -1), A_2 = (-1, 1), S = (1, -1), std 1, advantages (1, -1) up to eps.

    Raises:
        ValueError: `std_ddof` is neither 0 nor 1, `eps` is negative, or process rewards.
    """
    _validate(std_ddof=std_ddof, eps=eps)
    check_outcome_only(inputs, NAME)
    assert inputs.reward_components is not None, "reward_components are declared in `needs`"
    components = at_least_float32(inputs.reward_components)
    weights = components.new_ones(components.shape[1])
    if inputs.reward_weights is not None:
        weights = inputs.reward_weights.to(components)

    normalized = _normalized(components, Groups.of(inputs.group_ids), std_ddof, eps)
    combined = (normalized * weights).sum(1)

    divisor = max(len(combined) - std_ddof, 1)
    deviation = ((combined**2).sum() / divisor).sqrt()
    advantages = combined / (deviation + eps)
    return AdvantageOutput(advantages=broadcast_to_tokens(advantages, inputs.response_mask))


def _normalized(components: Tensor, groups: Groups, std_ddof: int, eps: float) -> Tensor:
    """Return [B, K] each function's rewards relative to their group; 0 where it failed."""
    present = ~components.isnan()
    values = torch.where(present, components, 0.0)
    counts = groups.total(present.to(values.dtype))

    mean = groups.spread(groups.total(values) / counts.clamp(min=1))
    centred = torch.where(present, values - mean, 0.0)
    variance = groups.total(centred**2) / (counts - std_ddof).clamp(min=1)

    # The mean of equal rewards may differ from them by rounding.
    highest = groups.extreme(torch.where(present, components, -torch.inf), "amax")
    lowest = groups.extreme(torch.where(present, components, torch.inf), "amin")
    differ = groups.spread(highest > lowest)
    return torch.where(differ, centred / (groups.spread(variance.sqrt()) + eps), 0.0)
