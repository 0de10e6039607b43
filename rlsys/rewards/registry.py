"""Reward functions by name: text in, number out."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from rlsys.registry import Registry

RewardFunction = Callable[..., float]
_REWARDS: Registry[RewardFunction] = Registry("reward function")


def register_reward_function(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: make `function(completion, ground_truth, *, keywords...) -> float` available in `reward.functions`.

    A function that needs the number of sampled tokens takes it third: `function(completion, ground_truth, completion_tokens, *, keywords...)`.
    """
    return _REWARDS.register(name)


def get_reward_function(name: str) -> RewardFunction:
    """The reward function called `name`.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    return _REWARDS.get(name, field="reward.functions.name")


def takes_completion_tokens(function: RewardFunction) -> bool:
    """Whether a reward function asks for the number of sampled tokens."""
    return "completion_tokens" in inspect.signature(function).parameters


def available_reward_functions() -> tuple[str, ...]:
    """All registered names, sorted."""
    return _REWARDS.names()
