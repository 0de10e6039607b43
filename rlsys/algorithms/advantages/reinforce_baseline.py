"""REINFORCE with one baseline for the whole batch."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import outcome_rewards
from rlsys.algorithms.advantages.returns import reward_to_go

BASELINES = ("batch_mean", "moving_average")


def _validate(*, baseline: str, decay: float) -> None:
    if baseline not in BASELINES:
        raise ValueError(
            f"algorithm.advantage.parameters.baseline: unknown {baseline!r}. Choose from "
            f"{', '.join(BASELINES)}."
        )
    if not 0 <= decay < 1:
        raise ValueError(f"algorithm.advantage.parameters.decay: {decay} is outside [0, 1)")


@register_advantage_estimator("reinforce_baseline", validate=_validate)
def reinforce_baseline_advantages(
    inputs: AdvantageInputs, *, baseline: str = "batch_mean", decay: float = 0.9
) -> AdvantageOutput:
    """The reward-to-go minus one number.

        batch_mean        A_t = G_t - mean(R)                      R the whole reward of each response of this batch
        moving_average    A_t = G_t - m,    m <- decay m + (1 - decay) mean(R) after the batch, m / (1 - decay^n) used

    Source: Williams 1992, section 4 (reinforcement comparison); Sutton and Barto, section 13.4.

    Shapes: rewards [B], token_rewards [B, T] or None -> advantages [B, T].

    Conventions: the batch mean contains response i itself, which scales the expected gradient by 1 - 1/B. The moving average is of
    past batches alone, so it leaves the gradient unbiased; before the first batch it is 0, and it is divided by 1 - decay^n against
    its start at 0. It is kept in the estimator's state.

    Example: rewards (1, 0, 0, 1), batch mean 1/2: advantages (1/2, -1/2, -1/2, 1/2).

    Raises:
        ValueError: unknown baseline, or a decay outside [0, 1).
    """
    _validate(baseline=baseline, decay=decay)
    mean = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask).mean()
    returns = reward_to_go(inputs.rewards, inputs.token_rewards, inputs.response_mask)
    if baseline == "batch_mean":
        value, state = float(mean), {}
    else:
        average, weight = inputs.state.get("average", 0.0), inputs.state.get("weight", 0.0)
        value = average / weight if weight else 0.0
        state = {
            "average": decay * average + (1 - decay) * float(mean),
            "weight": decay * weight + (1 - decay),
        }
    advantages = torch.where(inputs.response_mask, returns - value, 0.0)
    return AdvantageOutput(advantages=advantages, state=state, diagnostics={"baseline": value})
