"""Beta normalization policy optimization (BNPO)."""

from __future__ import annotations

import torch
from torch import Tensor

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

NAME = "bnpo"
FIELD = "algorithm.advantage.parameters"
LARGEST_FACTOR = 1e6


def _validate(*, lowest: float, highest: float) -> None:
    if not lowest < highest:
        raise ValueError(
            f"{FIELD}.lowest: {lowest:g} is not below highest {highest:g}. Give the range of the "
            "rewards."
        )


@register_advantage_estimator(
    "bnpo",
    compares_group=True,
    step_rewards="refused",
    validate=_validate,
    check=refuse_token_costs(NAME),
)
def bnpo_advantages(
    inputs: AdvantageInputs, *, lowest: float = 0.0, highest: float = 1.0
) -> AdvantageOutput:
    """Return the reward relative to its group, divided by a Beta density of the group's mean.

        A_i = (r_i - p) / Beta(p; alpha, beta)        p = mean(r) over the group of i
        alpha = max(1, 1 + a/3),  beta = max(1, 1 + b/3)

    a and b are the parameters of the Beta distribution with the mean m and the variance v of p
    over the groups of the batch: a = (m (1 - m) / v - 1) m, b = (m (1 - m) / v - 1) (1 - m).
    alpha = beta = 1 is no division (REINFORCE with the group's mean), and alpha = beta = 3/2 has
    the deviation sqrt(p (1 - p)) of GRPO up to a factor. The parameters follow the policy.

    Source: Xiao et al. 2025, BNPO: Beta Normalization Policy Optimization, section 3
    (arXiv:2506.02864), and the authors' recipe for verl.

    Shapes: rewards [B], response_mask [B, T] -> advantages [B, T].

    Conventions: for rewards of 0 and 1. Rewards in another range are mapped to [0, 1] by `lowest`
    and `highest` first. v divides by the number of groups - 1, as the authors do. With a single
    group, or the same p in all of them, there is no Beta distribution to fit, and alpha = beta = 1.
    1 / Beta(p) is at most 1e6. A group of one, or of equal rewards, gets exactly 0, and a group of
    one does not count in m and v. TRL's `loss_type: bnpo` is something else: the mean over the
    tokens of a microbatch, here `token_mean`. The paper's decomposition of several rewards is left
    out. Process rewards are refused.

    Example: groups of p 1/4 and 3/4: m 1/2, v 1/8, a = b = 1/2, alpha = beta = 7/6.

    Raises:
        ValueError: a reward outside [lowest, highest], `lowest` not below `highest`, or process
            rewards.
    """
    _validate(lowest=lowest, highest=highest)
    check_outcome_only(inputs, NAME)
    rewards = at_least_float32(inputs.rewards)
    remedy = f"Set {FIELD}.lowest and highest to the range of the rewards."
    check_reward_range(rewards, lowest, highest, NAME, remedy)

    rewards = (rewards - lowest) / (highest - lowest)
    groups = Groups.of(inputs.group_ids)
    means = (groups.total(rewards) / groups.counts).clamp(0.0, 1.0)
    alpha, beta = _fitted(means[groups.counts > 1])

    all_equal = groups.all_equal(rewards)
    centred = torch.where(all_equal, 0.0, rewards - groups.spread(means))
    factors = (-_log_density(means, alpha, beta)).exp().clamp(max=LARGEST_FACTOR)
    # Where the mean is 0 or 1 the density may be 0; all rewards are equal then.
    advantages = torch.where(all_equal, 0.0, centred * groups.spread(factors))
    return AdvantageOutput(
        advantages=broadcast_to_tokens(advantages, inputs.response_mask),
        diagnostics={"alpha": float(alpha), "beta": float(beta)},
    )


def _fitted(means: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and beta from the means of the groups."""
    one = means.new_ones(())
    if len(means) < 2 or bool(means.max() == means.min()):
        return one, one
    mean = means.mean()
    size = mean * (1 - mean) / means.var() - 1  # a + b
    return (1 + size * mean / 3).clamp(min=1.0), (1 + size * (1 - mean) / 3).clamp(min=1.0)


def _log_density(values: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return the log of the density of a Beta distribution."""
    log_norm = torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
    return log_norm + torch.xlogy(alpha - 1, values) + torch.xlogy(beta - 1, 1 - values)
