"""The plug-in of the check `grpo_recipe`: the share of digits as a reward function."""

from __future__ import annotations

from benchmarks.gpu_check.digits import digit_share as share
from rlsys.rewards import register_reward_function


@register_reward_function("digit_share")
def digit_share(completion: str, ground_truth: str) -> float:
    """Return the share of digits in the response."""
    return share(completion)
