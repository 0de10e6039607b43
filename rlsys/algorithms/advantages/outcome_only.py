"""Refusals of estimators that are defined for the rewards of functions, or for some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from rlsys.algorithms.advantages.contract import AdvantageInputs

if TYPE_CHECKING:
    from rlsys.config import RunConfig

# Sums of weighted float32 rewards may leave a range by rounding.
SLACK = 1e-5


def refuse_token_costs(name: str) -> Callable[[RunConfig], Iterator[str]]:
    """Return a `check` that refuses a KL or an entropy in the reward with the estimator `name`."""

    def check(config: RunConfig) -> Iterator[str]:
        kl, entropy = config.algorithm.kl, config.algorithm.entropy
        if kl.placement == "reward" and kl.coefficient > 0:
            yield (
                f"algorithm.kl.placement: 'reward' adds a cost to every token, and {name!r} is "
                "defined for the rewards of the reward functions alone. Set it to loss, or "
                "algorithm.kl.coefficient to 0."
            )
        if entropy.temperature > 0:
            yield (
                f"algorithm.entropy.temperature: {entropy.temperature:g} adds a reward to every "
                f"token, and {name!r} is defined for the rewards of the reward functions alone. "
                "Set it to 0; algorithm.entropy.bonus is in the loss."
            )

    return check


def check_outcome_only(inputs: AdvantageInputs, name: str) -> None:
    """Refuse process rewards.

    Raises:
        ValueError: the batch has `token_rewards`.
    """
    if inputs.token_rewards is not None:
        raise ValueError(
            f"token_rewards: {name!r} is defined for outcome rewards alone. Leave them out, or "
            "choose another estimator, such as grpo."
        )


def check_reward_range(rewards: Tensor, low: float, high: float, name: str, remedy: str) -> None:
    """Refuse rewards outside [low, high].

    Raises:
        ValueError: names a reward outside the range.
    """
    slack = SLACK * max(1.0, abs(low), abs(high) if high < float("inf") else 1.0)
    outside = (rewards < low - slack) | (rewards > high + slack)
    if bool(outside.any()):
        found = float(rewards[outside][0])
        bound = f"[{low:g}, {high:g}]" if high < float("inf") else f"[{low:g}, inf)"
        raise ValueError(
            f"algorithm.advantage.name: {name!r} takes rewards in {bound}, and a response has "
            f"{found:g}. {remedy}"
        )
