"""Scoring one completion with all configured reward functions: what a process of the reward pool does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.config import RewardFunctionConfig
from rlsys.rewards.math_verifier import verify_math
from rlsys.rewards.registry import get_reward_function, takes_completion_tokens


@dataclass(frozen=True, kw_only=True)
class Score:
    """The unweighted scores of one completion, and what the first function said of it."""

    components: tuple[float, ...]
    reason: str
    answer: str


def score_completion(
    functions: Sequence[RewardFunctionConfig],
    completion: str,
    ground_truth: str,
    completion_tokens: int = 0,
) -> Score:
    """Run all functions on one completion of so many sampled tokens. Errors of user functions are the caller's to handle."""
    reason, answer = "ok", ""
    components: list[float] = []
    for i, function in enumerate(functions):
        if function.name == "math":
            verdict = verify_math(completion, ground_truth, **function.parameters)
            components.append(verdict.score)
            if i == 0:
                reason, answer = verdict.reason, verdict.answer or ""
        else:
            reward = get_reward_function(function.name)
            arguments = (
                (completion, ground_truth, completion_tokens)
                if takes_completion_tokens(reward)
                else (completion, ground_truth)
            )
            value = float(reward(*arguments, **function.parameters))
            if not math.isfinite(value):
                raise ValueError(
                    f"reward function {function.name!r} returned {value}; a reward must be finite"
                )
            components.append(value)
    return Score(components=tuple(components), reason=reason, answer=answer)
