"""Reward functions by name: text in, number out."""

from __future__ import annotations

from collections.abc import Callable

from rlsys.registry import Registry

RewardFunction = Callable[..., float]
_REWARDS: Registry[RewardFunction] = Registry("reward function")


def register_reward_function(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: make `function(completion, ground_truth, *, keywords...) -> float` available in `reward.functions`."""
    return _REWARDS.register(name)


def get_reward_function(name: str) -> RewardFunction:
    """The reward function called `name`.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    return _REWARDS.get(name, field="reward.functions.name")


def available_reward_functions() -> tuple[str, ...]:
    """All registered names, sorted."""
    return _REWARDS.names()
