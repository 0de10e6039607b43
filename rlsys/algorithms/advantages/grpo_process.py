"""GRPO with process supervision."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups
from rlsys.algorithms.advantages.outcome_only import refuse_token_costs
from rlsys.algorithms.advantages.returns import (
    check_eps,
    check_std_ddof,
    last_tokens,
    step_rewards,
    suffix_sum,
)


def _validate(*, std_ddof: int, eps: float) -> None:
    check_std_ddof(std_ddof)
    check_eps(eps)


NAME = "grpo_process"


@register_advantage_estimator(
    "grpo_process",
    compares_group=True,
    step_rewards="needed",
    validate=_validate,
    # Between the ends of steps a cost per token would be lost.
    check=refuse_token_costs(NAME),
)
def grpo_process_advantages(
    inputs: AdvantageInputs, *, std_ddof: int = 0, eps: float = 1e-6
) -> AdvantageOutput:
    """Return normalised step rewards, summed over the current and all later steps.

        A_it = sum_k (r_ik - mean(R)) / (std(R) + eps)

    k runs over the steps of response i that end at or after t, and R are all step rewards of the
    group.

    Source: Shao et al. 2024, DeepSeekMath, section 4.1.3 (arXiv:2402.03300).

    Shapes: rewards [B], token_rewards [B, T], step_ends [B, T] bool or None -> advantages [B, T].

    Conventions: a step's reward is at its last token. The outcome belongs to the response's last
    step, and so do the tokens after that step's reward: the last step ends at the response's last
    token. Without `step_ends`, steps end where token_rewards are not 0; give them where the reward
    of a step may be 0. A response without steps is one step; without process rewards this is GRPO.
    A group of one step, or of equal step rewards, gets exactly 0. The paper writes "index(j) > t"
    in one place; here a step's own last token belongs to the step.

    Example: a group of ((0, 1), (0, 0)) with steps at every token: mean 1/4, std sqrt(3)/4;
    normalised ((-1, 3), (-1, -1)) / sqrt(3); advantages ((2, 3), (-2, -1)) / sqrt(3). A third token
    after the last step of each response has the advantage of the second.

    Raises:
        ValueError: `std_ddof` is neither 0 nor 1, or `eps` is negative.
    """
    _validate(std_ddof=std_ddof, eps=eps)
    mask = inputs.response_mask
    groups = Groups.of(inputs.group_ids)
    ends, rewards = _steps(inputs, mask & _given_ends(inputs))

    # Less the smallest first, so that equal step rewards cancel exactly.
    lowest = groups.extreme(torch.where(ends, rewards, torch.inf).amin(1), "amin")
    rewards = torch.where(ends, rewards - groups.spread(lowest)[:, None], 0.0)

    steps = groups.total(ends.sum(1))
    mean = groups.total(rewards.sum(1)) / steps.clamp(min=1)
    centred = torch.where(ends, rewards - groups.spread(mean)[:, None], 0.0)
    variance = groups.total((centred**2).sum(1)) / (steps - std_ddof).clamp(min=1)
    normalized = centred / (groups.spread(variance.sqrt())[:, None] + eps)
    return AdvantageOutput(advantages=torch.where(mask, suffix_sum(normalized), 0.0))


def _given_ends(inputs: AdvantageInputs) -> Tensor:
    """Return [B, T] bool `step_ends`, or the tokens with a process reward."""
    if inputs.step_ends is not None:
        return inputs.step_ends
    if inputs.token_rewards is None:
        return torch.zeros_like(inputs.response_mask)
    return inputs.token_rewards != 0


def _steps(inputs: AdvantageInputs, given: Tensor) -> tuple[Tensor, Tensor]:
    """Return [B, T] the ends of the steps and their rewards.

    The last of the `given` ends is moved to the response's last token, with its reward.
    """
    mask = inputs.response_mask
    final = given & (suffix_sum(given.long()) == 1)
    last = last_tokens(mask)

    rewards = step_rewards(inputs.rewards, inputs.token_rewards, mask)
    moved = torch.where(final & ~last, rewards, 0.0)
    rewards = rewards - moved + torch.where(last, moved.sum(1, keepdim=True), 0.0)
    return (given & ~final) | last, rewards
