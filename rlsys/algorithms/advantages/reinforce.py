"""REINFORCE: the return itself."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages.grouping import at_least_float32
from rlsys.algorithms.advantages.inputs import AdvantageInputs, AdvantageOutput, register_advantage_estimator


@register_advantage_estimator("reinforce")
def reinforce_advantages(inputs: AdvantageInputs) -> AdvantageOutput:
    """The reward-to-go, without a baseline.

        A_t = r + sum_{s >= t} r_s        r the outcome, r_s process rewards: a token answers only for what comes after it

    Source: Williams 1992; causality as in Sutton and Barto, section 13.3.

    Shapes: rewards [B], token_rewards [B, T] or None, response_mask [B, T] -> advantages [B, T].

    Conventions: undiscounted; a process reward at t counts for t itself; those outside the mask are ignored.
    """
    returns = at_least_float32(inputs.rewards)[:, None].expand(inputs.response_mask.shape)
    if inputs.token_rewards is not None:
        masked = torch.where(inputs.response_mask, at_least_float32(inputs.token_rewards), 0.0)
        returns = returns + masked.flip(1).cumsum(1).flip(1)
    return AdvantageOutput(advantages=torch.where(inputs.response_mask, returns, 0.0))
