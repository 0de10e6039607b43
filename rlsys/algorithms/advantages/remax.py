"""ReMax: the greedy response as the baseline."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import at_least_float32
from rlsys.algorithms.advantages.returns import reward_to_go


@register_advantage_estimator("remax", needs=("greedy_rewards",), unbiased=True)
def remax_advantages(inputs: AdvantageInputs) -> AdvantageOutput:
    """Return the reward-to-go minus the reward of the greedy response to the same prompt.

        A_t = G_t - r(greedy(x))

    The greedy response does not depend on the sampled one, so the gradient stays unbiased; it costs
    one more response per prompt.

    Source: Li et al. 2024, ReMax, algorithm 1 (arXiv:2310.10505).

    Shapes: rewards [B], greedy_rewards [B] -> advantages [B, T].

    Conventions: no scaling. The greedy reward has the rewards of the greedy response's steps in
    it; a KL or an entropy in the reward is not known there and counts as 0.

    Example: reward 1, greedy reward 0.25: advantage 0.75 at every token.
    """
    greedy = inputs.greedy_rewards
    assert greedy is not None, "greedy_rewards are declared in `needs`"
    mask = inputs.response_mask
    returns = reward_to_go(inputs.rewards, inputs.token_rewards, mask)
    above = returns - at_least_float32(greedy)[:, None]
    return AdvantageOutput(advantages=torch.where(mask, above, 0.0))
