"""GRPO with the KL to the reference in the advantage, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, outcome_rewards
from rlsys.algorithms.advantages.returns import check_eps, check_std_ddof, suffix_sum
from rlsys.algorithms.kl import token_log_ratios


def token_kl_returns(
    rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    coefficient: float,
    *,
    horizon: int | None = None,
) -> Tensor:
    """Return [B, T] the outcome minus the KL penalty of the current and all later tokens.

        r_j = r - (beta / H) sum_{i >= j} K_i,  K_i = old_logprobs_i - ref_logprobs_i

    It is GAE(1, 1) without a critic on the rewards -(beta / H) K_k, plus r at the last token. The
    score-function gradient of these returns is that of E[r] - (beta / H) KL(pi || reference),
    because H is one number. With each response's own length instead, the KL of long responses would
    count less, and the gradient would not be that of any objective. 0 outside the mask.

    Conventions: `horizon` is H; None: the length of the longest response here.
    """
    longest = int(response_mask.sum(1).max()) if response_mask.numel() else 1
    length = longest if horizon is None else horizon
    costs = token_log_ratios(old_logprobs, ref_logprobs, response_mask)
    returns = rewards[:, None] - coefficient / max(length, 1) * suffix_sum(costs)
    return torch.where(response_mask, returns, 0.0)


def _validate(*, std_ddof: int, eps: float, max_tokens: int | None) -> None:
    check_std_ddof(std_ddof)
    check_eps(eps)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(
            f"algorithm.advantage.parameters.max_tokens: {max_tokens} must be at least 1"
        )


@register_advantage_estimator(
    "token_kl_grpo",
    needs=("old_logprobs", "ref_logprobs"),
    compares_group=True,
    carries_kl=True,
    validate=_validate,
)
def token_kl_grpo_advantages(
    inputs: AdvantageInputs,
    *,
    std_ddof: int = 0,
    eps: float = 1e-6,
    max_tokens: int | None = None,
) -> AdvantageOutput:
    """Return the KL-regularised reward-to-go of each token, relative to its group at the position.

        r_j = r - (beta / H) sum_{i >= j} K_i        K_i = old_logprobs_i - ref_logprobs_i
        A_j = (r_j - mean_j) / (std_j + eps)         beta = algorithm.kl.coefficient

    mean_j and std_j are over the responses of the group that have a token at j. A token is
    penalised for the KL from it on, not for that of earlier tokens; the loss needs no KL term of
    its own (`algorithm.kl.placement: advantage`).

    Source: Bai and Zhang 2026, Token-Level KL-Regularized Policy Gradient and GRPO.

    Shapes: rewards [B], old_logprobs and ref_logprobs [B, T] -> advantages [B, T].

    Conventions: H is one number for all responses, `max_tokens`; a run sets it to
    `generation.max_tokens` where it is null. None in a call is the length of the longest response,
    which then influences H. So beta is the penalty for one nat per token over a response of full
    length; aggregate with `constant`, which has one length for all responses too. `std_ddof` 0 as
    in the source. Alone at its position, or among equal returns, a response gets exactly 0: the
    tails of the longest responses have no gradient. beta = 0 is GRPO, except for such tails.
    Process rewards are summed into the outcome.

    Example: beta 1, a group of rewards (1, 1), K ((0.2, 0.4), (0, 0)): r = ((0.7, 0.8), (1, 1));
    at j = 0 mean 0.85, std 0.15, A = (-1, 1).

    Raises:
        ValueError: `std_ddof` neither 0 nor 1, a negative `eps`, or `max_tokens` not positive.
    """
    _validate(std_ddof=std_ddof, eps=eps, max_tokens=max_tokens)
    old, ref = inputs.old_logprobs, inputs.ref_logprobs
    assert old is not None, "old_logprobs are declared in `needs`"
    assert ref is not None, "ref_logprobs are declared in `needs`"
    mask = inputs.response_mask
    groups = Groups.of(inputs.group_ids)
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, mask)
    returns = token_kl_returns(rewards, old, ref, mask, inputs.kl_coefficient, horizon=max_tokens)

    alive = groups.total(mask.to(returns.dtype))
    mean = groups.total(returns) / alive.clamp(min=1)
    centred = torch.where(mask, returns - groups.spread(mean), 0.0)

    # Squares of very small or large returns would leave the range of float32, and 0 / 0 would be
    # NaN, so the deviations are scaled to at most 1 first.
    scale = groups.extreme(centred.abs(), "amax").clamp(min=torch.finfo(centred.dtype).tiny)
    unit = centred / groups.spread(scale)
    std = scale * (groups.total(unit**2) / (alive - std_ddof).clamp(min=1)).sqrt()
    advantages = centred / (groups.spread(std) + eps)

    # Equal returns may differ from their mean by rounding.
    highest = groups.extreme(torch.where(mask, returns, -torch.inf), "amax")
    lowest = groups.extreme(torch.where(mask, returns, torch.inf), "amin")
    differs = groups.spread(highest > lowest)
    return AdvantageOutput(advantages=torch.where(mask & differs, advantages, 0.0))
