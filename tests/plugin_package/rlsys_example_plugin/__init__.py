"""An example of a user's own package: one advantage estimator and two rewards."""

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
from rlsys.rewards import register_reward_function


@register_advantage_estimator("example_sign")
def sign_advantages(
    inputs: AdvantageInputs, *, threshold: float = 0.5, scale: float = 1.0
) -> AdvantageOutput:
    """+scale for responses whose reward exceeds the threshold, -scale for the others."""
    signs = torch.where(inputs.rewards > threshold, scale, -scale)
    advantages = torch.where(inputs.response_mask, signs[:, None], 0.0)
    return AdvantageOutput(
        advantages=advantages, diagnostics={"positive_fraction": float((signs > 0).float().mean())}
    )


@register_reward_function("example_digits")
def digits_reward(completion: str, ground_truth: str, *, per_digit: float = 0.1) -> float:
    """A reward that even a random model can raise: digits in the completion, each worth `per_digit`, at most 1."""
    return min(1.0, per_digit * len(re.findall(r"\d", completion)))


@register_reward_function("example_trouble")
def trouble_reward(completion: str, ground_truth: str) -> float:
    """Misbehaves on demand, for tests of the reward pool."""
    if completion == "hang":
        time.sleep(3600)
    if completion == "hang in c":
        re.match(
            r"(a+)+$", "a" * 60 + "b"
        )  # catastrophic backtracking never returns to the interpreter
    if completion == "ignore signals":
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        time.sleep(3600)
    if completion == "crash":
        os._exit(3)
    if completion == "print":
        print("printed as asked")
    if completion == "raise":
        raise RuntimeError("as asked")
    return 1.0
