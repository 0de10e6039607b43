"""REINFORCE++: returns normalised over the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, outcome_rewards
from rlsys.algorithms.advantages.returns import check_eps, reward_to_go, whitened


def _subtracts_group_mean(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters.get("group_baseline", False))


def _validate(*, eps: float, **_: object) -> None:
    check_eps(eps)


@register_advantage_estimator(
    "reinforce_plus_plus", compares_group=_subtracts_group_mean, validate=_validate
)
def reinforce_plus_plus_advantages(
    inputs: AdvantageInputs, *, group_baseline: bool = False, eps: float = 1e-8
) -> AdvantageOutput:
    """Return the reward-to-go, normalised over all tokens of the batch.

        A_t = (G_t - mean(G)) / (std(G) + eps)
        A_t = (G_t - m - mean(G - m)) / (std(G - m) + eps)      with `group_baseline`

    mean and std are over the batch's tokens, and m is the group's mean reward. Statistics of the
    batch vary less than those of one small group. The published method places the KL to the
    reference in the token rewards (`algorithm.kl.placement: reward`, k1), and for the variant with
    a group baseline in the loss (k2).

    Source: Hu et al. 2025, REINFORCE++, sections 3.1 and 3.2 (arXiv:2501.03262).

    Shapes: rewards [B], token_rewards [B, T] or None -> advantages [B, T].

    Conventions: std has ddof 0 and eps is added to it. A batch of equal returns gets exactly 0.

    Example: two responses of one token, rewards (1, 0): mean 1/2, std 1/2, advantages (1, -1).
    """
    mask = inputs.response_mask
    returns = reward_to_go(inputs.rewards, inputs.token_rewards, mask)
    if group_baseline:
        groups = Groups.of(inputs.group_ids)
        rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, mask)
        returns = returns - groups.spread(groups.total(rewards) / groups.counts)[:, None]
    return AdvantageOutput(advantages=whitened(returns, mask, eps))
