"""REINFORCE with one baseline for the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def _does_not_see_the_batch(parameters: Mapping[str, Any]) -> bool:
    return parameters.get("baseline") == "moving_average"


@register_advantage_estimator(
    "reinforce_baseline", unbiased=_does_not_see_the_batch, validate=_validate
)
def reinforce_baseline_advantages(
    inputs: AdvantageInputs, *, baseline: str = "batch_mean", decay: float = 0.9
) -> AdvantageOutput:
    """Return the reward-to-go minus one number for the whole batch.

        batch_mean        A_t = G_t - mean(R)
        moving_average    A_t = G_t - m / (1 - decay^n)
                          m <- decay m + (1 - decay) mean(R) after the batch

    R is the whole reward of each response of the batch, and n the number of earlier batches.

    Source: Williams 1992, section 4 (reinforcement comparison); Sutton and Barto, section 13.4.

    Shapes: rewards [B], token_rewards [B, T] or None -> advantages [B, T].

    Conventions: `baseline` is batch_mean or moving_average. The batch mean contains response i
    itself, which scales the expected gradient by 1 - 1/B. The moving average is of past batches
    alone, so it leaves the gradient unbiased; before the first batch it is 0, and the division by
    1 - decay^n corrects for its start at 0. It is kept in the estimator's state. `decay` is the
    factor of the moving average per batch.

    Example: rewards (1, 0, 0, 1), batch mean 1/2: advantages (1/2, -1/2, -1/2, 1/2).

    Raises:
        ValueError: unknown baseline, or a decay outside [0, 1).
    """
    _validate(baseline=baseline, decay=decay)
    mean = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask).mean()
    returns = reward_to_go(inputs.rewards, inputs.token_rewards, inputs.response_mask)

    if baseline == "batch_mean":
        value = float(mean)
        state = {}
    else:
        average = inputs.state.get("average", 0.0)
        weight = inputs.state.get("weight", 0.0)  # 1 - decay^n
        value = average / weight if weight else 0.0
        state = {
            "average": decay * average + (1 - decay) * float(mean),
            "weight": decay * weight + (1 - decay),
        }

    advantages = torch.where(inputs.response_mask, returns - value, 0.0)
    return AdvantageOutput(advantages=advantages, state=state, diagnostics={"baseline": value})
