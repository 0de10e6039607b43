"""Ratios that stay finite and keep their gradient."""

import math

import pytest
import torch

from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    policy_objective,
)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [19.0, 30.0, 200.0, -30.0])
def test_beyond_the_cap_a_token_keeps_its_gradient_or_counts_as_clipped(
    log_ratio: float, sign: float
):
    """The value of rho is capped at e^+-20, its gradient is not: only a weight cuts gradients."""
    for weight in ("importance", "ppo_clip", "dual_clip", "minimum"):
        live = torch.tensor([[log_ratio - 1]], dtype=torch.float64, requires_grad=True)
        made = PolicyObjectiveInputs(
            logprobs=live,
            old_logprobs=torch.tensor([[-1.0]], dtype=torch.float64),
            advantages=torch.tensor([[sign]], dtype=torch.float64),
            response_mask=torch.ones(1, 1, dtype=torch.bool),
        )
        out = policy_objective(made, ratio="token", weight=weight)
        out.token_losses.sum().backward()
        assert live.grad is not None
        capped = math.exp(min(max(log_ratio, -20.0), 20.0))
        clipped = bool(out.metrics["clipped"].item())
        assert live.grad.item() == pytest.approx(0.0 if clipped else -sign * capped)
        assert clipped == (live.grad.item() == 0.0)
