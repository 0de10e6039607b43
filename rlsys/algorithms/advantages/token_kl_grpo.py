"""GRPO whose advantage already carries the KL to the reference, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.advantages.grouping import Groups, at_least_float32, outcome_rewards
from rlsys.algorithms.advantages.inputs import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.returns import suffix_sum


def token_kl_returns(
    rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    coefficient: float,
) -> Tensor:
    """[B, T] r_j = r - (beta / H) sum_{i >= j} K_i,  K_i = old_logprobs_i - ref_logprobs_i: the outcome minus the KL that is still to be paid.

    It is GAE(1, 1) without a critic on the rewards -(beta / H) K_k, plus r at the last token. H counts the response's own tokens. 0
    outside the mask.
    """
    lengths = response_mask.sum(1, keepdim=True).clamp(min=1).to(rewards.dtype)
    costs = torch.where(
        response_mask, at_least_float32(old_logprobs) - at_least_float32(ref_logprobs), 0.0
    )
    returns = rewards[:, None] - coefficient / lengths * suffix_sum(costs)
    return torch.where(response_mask, returns, 0.0)


@register_advantage_estimator(
    "token_kl_grpo", needs=("old_logprobs", "ref_logprobs"), compares_group=True
)
def token_kl_grpo_advantages(
    inputs: AdvantageInputs, *, std_ddof: int = 0, eps: float = 1e-6
) -> AdvantageOutput:
    """The KL-regularised reward-to-go of each token, relative to the group at the same position.

        r_j = r - (beta / H) sum_{i >= j} K_i        K_i = old_logprobs_i - ref_logprobs_i,  beta = algorithm.kl.coefficient
        A_j = (r_j - mean_j) / (std_j + eps)         mean and std over the responses of the group that are still alive at j

    A token answers for the KL from it on, not for what is already spent; the loss needs no KL term of its own
    (`algorithm.kl.placement: advantage`).

    Source: Bai and Zhang 2026, Token-Level KL-Regularized Policy Gradient and GRPO.

    Shapes: rewards [B], old_logprobs and ref_logprobs [B, T] -> advantages [B, T].

    Conventions: H is the length of the response itself; `std_ddof` 0 as in the source. Alone at its position, or among equal
    returns, a response gets exactly 0: the tails of the longest responses teach nothing about the reward. beta = 0 is GRPO, except
    for such tails. Process rewards are summed into the outcome.

    Example: beta 1, a group of rewards (1, 1), K ((0.2, 0.4), (0, 0)): r = ((0.7, 0.8), (1, 1)); at j = 0 mean 0.85, std 0.15, A =
    (-1, 1).

    Raises:
        ValueError: no old or ref log-probabilities, or `std_ddof` neither 0 nor 1.
    """
    if std_ddof not in (0, 1):
        raise ValueError(f"algorithm.advantage.parameters.std_ddof: {std_ddof} is neither 0 nor 1")
    old = inputs.require(
        "old_logprobs",
        estimator="token_kl_grpo",
        remedy="The policy computes them before the update.",
    )
    ref = inputs.require(
        "ref_logprobs",
        estimator="token_kl_grpo",
        remedy="Set algorithm.kl.coefficient above 0: the reference runs then.",
    )
    mask, groups = inputs.response_mask, Groups.of(inputs.group_ids)
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, mask)
    returns = token_kl_returns(rewards, old, ref, mask, inputs.kl_coefficient)
    highest = groups.extreme(torch.where(mask, returns, -torch.inf), "amax")
    lowest = groups.extreme(torch.where(mask, returns, torch.inf), "amin")
    alive = groups.total(mask.to(returns.dtype))
    centred = torch.where(
        mask, returns - groups.spread(groups.total(returns) / alive.clamp(min=1)), 0.0
    )
    std = (groups.total(centred**2) / (alive - std_ddof).clamp(min=1)).sqrt()
    advantages = centred / (groups.spread(std) + eps)
    return AdvantageOutput(
        advantages=torch.where(mask & groups.spread(highest > lowest), advantages, 0.0)
    )
