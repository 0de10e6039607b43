"""DRO: golden gradients, the squared error of whole responses, and its optimum."""

from __future__ import annotations

import math

import pytest
import torch

from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    check_objective,
    policy_objective,
)
from tests.support.enumerable_policy import ResponseSpace
from tests.support.objective_examples import objective_inputs


def test_golden():
    # old log-probs are -1: value log pi A - 1/4 d^2, gradient A - 1/2 d
    made, live = objective_inputs([2.0, 0.5, 1.0], [1.0, -2.0, 0.0])
    out = policy_objective(made, ratio="token", weight="dro", beta=0.5)
    out.token_losses.sum().backward()
    d = math.log(2.0)
    assert out.token_losses[0].tolist() == pytest.approx(
        [-((d - 1) - d * d / 4), -(2 * (d + 1) - d * d / 4), 0.0]
    )
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([-(1 - d / 2), -(-2 + d / 2), 0.0])


def test_a_token_without_an_advantage_is_pulled_back():
    made, live = objective_inputs([2.0], [0.0])
    policy_objective(made, ratio="token", weight="dro", beta=0.5).token_losses.sum().backward()
    assert live.grad is not None
    assert float(live.grad) == pytest.approx(math.log(2.0) / 2)


def test_with_the_product_it_is_the_squared_error_of_whole_responses():
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(5, 4, generator=generator, dtype=torch.float64)
    live = (old + torch.randn(5, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.arange(4)[None, :] < torch.tensor([4, 1, 3, 2, 4])[:, None]
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    beta = 0.3

    made = PolicyObjectiveInputs(
        logprobs=live,
        old_logprobs=old,
        advantages=advantages[:, None].expand(5, 4),
        response_mask=mask,
    )
    losses = policy_objective(made, ratio="product", weight="dro", beta=beta).token_losses
    (found,) = torch.autograd.grad(aggregate_loss(losses, mask, "sequence_sum"), live)
    totals = torch.where(mask, live - old, 0.0).sum(1)
    squared = ((advantages - beta * totals) ** 2 / (2 * beta)).mean()
    (wanted,) = torch.autograd.grad(squared, live)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", [0, 1])
def test_its_gradient_is_zero_at_the_regularised_optimum_whoever_sampled(seed: int):
    """pi = old exp(r / beta) / Z, with A = r - beta log Z; at `old` itself it is not."""
    generator = torch.Generator().manual_seed(seed)
    space = ResponseSpace.of(3, 1)
    old = space.random_logits(generator)
    rewards = torch.rand(len(space.tokens), generator=generator, dtype=torch.float64)
    beta = 0.4
    order = space.tokens[:, 0].argsort()
    optimum = old + (rewards[order] / beta)[None, :]
    value = beta * (space.probabilities(old) * (rewards / beta).exp()).sum().log()

    def gradient(logits: torch.Tensor) -> torch.Tensor:
        table = logits.clone().requires_grad_()
        made = PolicyObjectiveInputs(
            logprobs=space.logprobs(table),
            old_logprobs=space.logprobs(old),
            advantages=(rewards - value)[:, None].expand(space.mask.shape),
            response_mask=space.mask,
        )
        losses = policy_objective(made, ratio="product", weight="dro", beta=beta).token_losses
        sampler = space.probabilities(space.random_logits(torch.Generator().manual_seed(9)))
        (found,) = torch.autograd.grad((sampler * losses.sum(1)).sum(), table)
        return found

    assert float(gradient(optimum).abs().max()) < 1e-12
    assert float(gradient(old).abs().max()) > 1e-3


def test_refusals():
    with pytest.raises(ValueError, match=r"parameters\.beta: -1.0 is outside"):
        check_objective("token", "dro", {"beta": -1.0})
