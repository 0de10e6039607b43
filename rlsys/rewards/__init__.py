"""Rewards: registered functions from a completion and a ground truth to a number."""

from rlsys.rewards.functions import (
    format_boxed_reward,
    format_r1_zero_reward,
    math_reward,
    repetition_reward,
    soft_overlong_reward,
)
from rlsys.rewards.math_verifier import MathVerdict, verify_math
from rlsys.rewards.registry import (
    available_reward_functions,
    get_reward_function,
    register_reward_function,
)

__all__ = [
    "MathVerdict",
    "available_reward_functions",
    "format_boxed_reward",
    "format_r1_zero_reward",
    "get_reward_function",
    "math_reward",
    "register_reward_function",
    "repetition_reward",
    "soft_overlong_reward",
    "verify_math",
]
