"""Scoring one completion with all configured reward functions: what a process of the reward pool does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.config import RewardFunctionConfig
from rlsys.rewards.math_verifier import verify_math
from rlsys.rewards.registry import get_reward_function


@dataclass(frozen=True, kw_only=True)
class Score:
    """The unweighted scores of one completion, and what the first function said of it."""

    components: tuple[float, ...]
    reason: str
    answer: str


def score_completion(functions: Sequence[RewardFunctionConfig], completion: str, ground_truth: str) -> Score:
    """Run all functions on one completion. Errors of user functions are the caller's to handle."""
    reason, answer = "ok", ""
    components: list[float] = []
    for i, function in enumerate(functions):
        if function.name == "math":
            verdict = verify_math(completion, ground_truth)
            components.append(verdict.score)
            if i == 0:
                reason, answer = verdict.reason, verdict.answer or ""
        else:
            value = float(get_reward_function(function.name)(completion, ground_truth, **function.parameters))
            if not math.isfinite(value):
                raise ValueError(f"reward function {function.name!r} returned {value}; a reward must be finite")
            components.append(value)
    return Score(components=tuple(components), reason=reason, answer=answer)
