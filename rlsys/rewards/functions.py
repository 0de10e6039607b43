"""The rewards that come with rlsys."""

from __future__ import annotations

import re

from rlsys.rewards.math_verifier import last_boxed, verify_math
from rlsys.rewards.registry import register_reward_function

_R1_ZERO = re.compile(
    r"^(?:(?!</think>|<think>|</?answer>).)*</think>\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*$", re.DOTALL
)


@register_reward_function("math")
def math_reward(completion: str, ground_truth: str) -> float:
    """1 where the completion's answer equals the ground truth, else 0. See `verify_math`."""
    return verify_math(completion, ground_truth).score


@register_reward_function("format_boxed")
def format_boxed_reward(completion: str, ground_truth: str) -> float:
    """1 where the completion holds exactly one box, closed and not empty, else 0; right or wrong does not matter."""
    content = last_boxed(completion)
    return float(completion.count("\\boxed") == 1 and bool(content and content.strip()))


@register_reward_function("format_r1_zero")
def format_r1_zero_reward(completion: str, ground_truth: str) -> float:
    """1 where the completion reads `reasoning </think> <answer> ... </answer>` with each tag exactly once, else 0.

    The opening <think> belongs to the prompt (template `r1_zero`).
    """
    return float(_R1_ZERO.match(completion) is not None)
