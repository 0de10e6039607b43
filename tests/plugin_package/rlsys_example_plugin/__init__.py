"""An example of a user's own package: one advantage estimator and three rewards."""

import os
import re
import signal
import time

import torch

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.rewards import RewardResult, register_reward_function


@register_advantage_estimator("example_sign")
def sign_advantages(
    inputs: AdvantageInputs, *, threshold: float = 0.5, scale: float = 1.0
) -> AdvantageOutput:
    """Return +scale for responses whose reward exceeds the threshold, and -scale for the rest."""
    signs = torch.where(inputs.rewards > threshold, scale, -scale)
    advantages = torch.where(inputs.response_mask, signs[:, None], 0.0)
    return AdvantageOutput(
        advantages=advantages, diagnostics={"positive_fraction": float((signs > 0).float().mean())}
    )


@register_reward_function("example_digits")
def digits_reward(completion: str, ground_truth: str, *, per_digit: float = 0.1) -> float:
    """Return `per_digit` for each digit in the completion, at most 1.

    Even a random model can raise this reward.
    """
    return min(1.0, per_digit * len(re.findall(r"\d", completion)))


@register_reward_function("example_steps", steps=True)
def steps_reward(completion: str, ground_truth: str, *, characters: int = 4) -> RewardResult:
    """Reward each step of `characters` characters with its fraction of digits."""
    ends = [*range(characters, len(completion), characters), len(completion)]
    steps = [completion[max(0, end - characters) : end] for end in ends if end]
    return RewardResult(
        0.0,
        step_rewards=[sum(map(str.isdigit, step)) / characters for step in steps],
        step_ends=[end for end in ends if end],
    )


@register_reward_function("example_trouble")
def trouble_reward(completion: str, ground_truth: str) -> float:
    """Misbehave on request, for tests of the reward pool."""
    if completion == "hang":
        time.sleep(3600)
    if completion == "hang in c":
        # Catastrophic backtracking never returns to the interpreter.
        re.match(r"(a+)+$", "a" * 60 + "b")
    if completion == "ignore signals":
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        time.sleep(3600)
    if completion == "crash":
        os._exit(3)
    if completion == "print":
        print("printed as requested")
    if completion == "raise":
        raise RuntimeError("as requested")
    return 1.0
