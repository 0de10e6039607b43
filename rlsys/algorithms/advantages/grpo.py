"""Group-relative advantages (GRPO)."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, broadcast_to_tokens, outcome_rewards
from rlsys.algorithms.advantages.returns import check_eps, check_std_ddof


def _validate(*, std_ddof: int, eps: float, **_: object) -> None:
    check_std_ddof(std_ddof)
    check_eps(eps)


@register_advantage_estimator("grpo", compares_group=True, validate=_validate)
def grpo_advantages(
    inputs: AdvantageInputs, *, std_ddof: int = 0, eps: float = 1e-6, divide_by_std: bool = True
) -> AdvantageOutput:
    """Return the reward of a response relative to its group, at every token of it.

        A_i = (r_i - mean(r)) / (std(r) + eps)        mean and std over the group of i

    Source: Shao et al. 2024, DeepSeekMath, section 4.1.2 (arXiv:2402.03300). Without the division:
    Liu et al. 2025, Understanding R1-Zero-Like Training, section 3 (Dr. GRPO, arXiv:2503.20783).

    Shapes: rewards [B], response_mask [B, T] -> advantages [B, T].

    Conventions: `std_ddof` 0 divides the squares by G (the published formula), 1 by G - 1 (verl,
    TRL). `eps` is added to the standard deviation, not under the root. `divide_by_std` false leaves
    the division out. A group of one, or of equal rewards, gets exactly 0, without rounding errors.
    Process rewards, where present, are summed into the outcome.

    Example: rewards (1, 0, 0, 1), ddof 0: mean 1/2, std 1/2, advantages (1, -1, -1, 1) up to eps.

    Raises:
        ValueError: `std_ddof` is neither 0 nor 1, or `eps` is negative.
    """
    _validate(std_ddof=std_ddof, eps=eps)
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask)
    groups = Groups.of(inputs.group_ids)
    advantages = rewards - groups.spread(groups.total(rewards) / groups.counts)
    if divide_by_std:
        variance = groups.total(advantages**2) / (groups.counts - std_ddof).clamp(min=1)
        advantages = advantages / (groups.spread(variance.sqrt()) + eps)

    # The mean of equal rewards may differ from them by rounding.
    advantages = torch.where(groups.all_equal(rewards), 0.0, advantages)
    return AdvantageOutput(advantages=broadcast_to_tokens(advantages, inputs.response_mask))
