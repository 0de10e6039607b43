"""GMPO: golden numbers, and the paper's loss of whole responses differentiated."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    check_objective,
    policy_objective,
)
from tests.support.objective_examples import objective_inputs


def test_golden():
    # A > 0: log 1.5 = 0.405 and log 3 are above 0.4, log(1/2) is not clipped:
    # s = exp((0.4 - 0.693147 + 0.4) / 3) = exp(0.035618) = 1.036260
    made, live = objective_inputs([1.5, 0.5, 3.0], [2.0, 2.0, 2.0])
    out = policy_objective(made, ratio="token", weight="gmpo")
    out.token_losses.sum().backward()
    s = math.exp((0.8 - math.log(2.0)) / 3)
    assert live.grad is not None
    assert out.token_losses[0].tolist() == pytest.approx([-2 * s] * 3)
    assert live.grad[0].tolist() == pytest.approx([0.0, -2 * s, 0.0])
    assert out.metrics["clipped"][0].tolist() == [1.0, 0.0, 1.0]

    # A < 0: only log(1/2) is below -0.4
    made, live = objective_inputs([1.5, 0.5, 3.0], [-1.0, -1.0, -1.0])
    policy_objective(made, ratio="token", weight="gmpo").token_losses.sum().backward()
    s = math.exp((math.log(4.5) - 0.4) / 3)
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([s, 0.0, s])


def published_loss(live: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over responses of -A exp(mean of the clipped log-ratios)."""
    losses = []
    for row in range(len(live)):
        sign = 1.0 if advantages[row] > 0 else -1.0
        logs = [
            sign * torch.minimum(sign * d, sign * d.clamp(-0.4, 0.4))
            for d in (live - old)[row][mask[row]]
        ]
        losses.append(-advantages[row] * torch.stack(logs).mean().exp())
    return torch.stack(losses).mean()


def test_with_sequence_mean_it_is_the_loss_of_the_paper():
    """Value and gradient, at ratios on both sides of the range, with mixed lengths and a hole."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(6, 7, generator=generator, dtype=torch.float64)
    live = (old + torch.randn(6, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.arange(7)[None, :] < torch.tensor([7, 3, 1, 6, 5, 2])[:, None]
    mask[0, 2] = False
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)

    made = PolicyObjectiveInputs(
        logprobs=live,
        old_logprobs=old,
        advantages=advantages[:, None].expand(6, 7),
        response_mask=mask,
    )
    losses = policy_objective(made, ratio="token", weight="gmpo").token_losses
    ours = aggregate_loss(losses, mask, "sequence_mean")
    theirs = published_loss(live, old, advantages, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
    (found,) = torch.autograd.grad(ours, live)
    (wanted,) = torch.autograd.grad(theirs, live)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_refusals():
    with pytest.raises(ValueError, match=r"parameters\.clip_low: -0.1 is outside \[0, inf\)"):
        check_objective("token", "gmpo", {"clip_low": -0.1})
    with pytest.raises(ValueError, match=r"ratio: 'sequence' with weight 'gmpo'.*ratio token"):
        check_objective("sequence", "gmpo", {})
