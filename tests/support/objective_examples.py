"""Inputs of policy objectives for tests."""

import torch
from torch import Tensor

from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    available_ratios,
    available_weights,
    levels_of,
)

COMBINATIONS = [
    (level, weight)
    for weight in available_weights()
    for level in levels_of(weight) or available_ratios()
]


def objective_inputs(
    ratios: list[float], advantages: list[float]
) -> tuple[PolicyObjectiveInputs, Tensor]:
    """Return one response with the given token ratios and old log-probabilities of -1."""
    old = torch.full((1, len(ratios)), -1.0, dtype=torch.float64)
    live = (old + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_()
    mask = torch.ones(1, len(ratios), dtype=torch.bool)

    inputs = PolicyObjectiveInputs(
        logprobs=live,
        old_logprobs=old,
        advantages=torch.tensor([advantages], dtype=torch.float64),
        response_mask=mask,
    )
    return inputs, live
