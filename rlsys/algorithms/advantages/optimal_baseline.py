"""REINFORCE with the constant baseline of least variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import (
    Groups,
    at_least_float32,
    broadcast_to_tokens,
    leaves_one_out,
    outcome_rewards,
)

SCOPES = ("group", "batch")


def _within_group(parameters: Mapping[str, Any]) -> bool:
    return parameters.get("scope", "group") == "group"


def _validate(*, scope: str, **_: object) -> None:
    if scope not in SCOPES:
        raise ValueError(
            f"algorithm.advantage.parameters.scope: unknown {scope!r}. Choose from "
            f"{', '.join(SCOPES)}."
        )


@register_advantage_estimator(
    "optimal_baseline",
    needs=("squared_score_norms",),
    compares_group=_within_group,
    unbiased=leaves_one_out,
    validate=_validate,
)
def optimal_baseline_advantages(
    inputs: AdvantageInputs, *, leave_one_out: bool = False, scope: str = "group"
) -> AdvantageOutput:
    """Return the reward minus the average reward weighted by squared score norms.

        b = E[g^2 r] / E[g^2],    g_i^2 = sum_t ||grad log pi(y_it)||^2,    A_i = r_i - b

    b minimises E[g^2 (r - b)^2], the variance of the score-function estimator among constant
    baselines. `squared_score_norms` hold a proxy of the squared norms: that of the gradient with
    respect to the logits, 1 - 2 pi(a) + sum_k pi_k^2.

    Source: Greensmith et al. 2004, section 3.2; Peters and Schaal 2008, section 3.2.

    Shapes: rewards [B], squared_score_norms [B, T] -> advantages [B, T].

    Conventions: the sum over t leaves out the products between different tokens' gradients.
    Expectations are over the response's group, or over the whole batch (`scope`). With
    `leave_one_out` they leave the response itself out, and the gradient is unbiased; without, b
    depends on r_i. Where the weights sum to 0 the plain mean is used. A response that is alone gets
    exactly 0, as does a group of equal rewards. With scope `batch` a run may sample one response
    per prompt.

    Example: rewards (1, 0), g^2 (3, 1): b = 3/4, advantages (1/4, -3/4). Leave-one-out: b = (0, 1),
    advantages (1, -1).

    Raises:
        ValueError: unknown scope.
    """
    _validate(scope=scope)
    norms = inputs.squared_score_norms
    assert norms is not None, "squared_score_norms are declared in `needs`"
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask)
    group_ids = inputs.group_ids
    if scope == "batch":
        group_ids = torch.zeros_like(group_ids)
    groups = Groups.of(group_ids)

    weights = torch.where(inputs.response_mask, at_least_float32(norms), 0.0).sum(1)
    advantages = rewards_above_baseline(rewards, weights, groups, leave_one_out)
    return AdvantageOutput(advantages=broadcast_to_tokens(advantages, inputs.response_mask))


def rewards_above_baseline(
    rewards: torch.Tensor, weights: torch.Tensor, groups: Groups, leave_one_out: bool = False
) -> torch.Tensor:
    """Return [B] r_i - sum_j w_j r_j / sum_j w_j over the group of i.

    With `leave_one_out` the sums leave out i itself. Where all those weights are 0 the plain mean
    is used. Sums are formed in float64.
    """
    # Less the group's smallest, so that equal rewards cancel exactly.
    shifted = rewards.double() - groups.spread(groups.extreme(rewards, "amin"))
    weights = weights.double()

    def over_group(values: torch.Tensor) -> torch.Tensor:
        if leave_one_out:
            return groups.others_total(values)
        return groups.spread(groups.total(values))

    def mean(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = over_group(weights)
        has_weight = total > 0
        return over_group(weights * shifted) / torch.where(has_weight, total, 1.0), has_weight

    weighted_mean, has_weight = mean(weights)
    plain_mean, _ = mean(torch.ones_like(weights))
    above = shifted - torch.where(has_weight, weighted_mean, plain_mean)

    alone = groups.spread(groups.counts) == 1
    return torch.where(alone, 0.0, above).to(rewards.dtype)
