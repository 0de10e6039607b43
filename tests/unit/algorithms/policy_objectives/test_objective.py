"""Properties of every combination of ratio and weight."""

import dataclasses

import pytest
import torch

from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    gradient_coefficient,
    policy_objective,
)
from tests.support.objective_examples import COMBINATIONS, objective_inputs

# Weights whose coefficient depends on the other tokens of the response or of the batch.
OF_SEVERAL_TOKENS = ("reward_time", "gmpo", "clip_cov", "kl_cov")


@pytest.mark.parametrize(
    ("level", "weight"), [pair for pair in COMBINATIONS if pair[1] not in OF_SEVERAL_TOKENS]
)
def test_the_gradient_of_an_objective_is_its_coefficient(level: str, weight: str):
    """d loss / d log pi_t = -w(rho_t, A_t) A_t at every ratio level.

    Ratios are on both sides of every edge.
    """
    made, live = objective_inputs([0.3, 1.9, 1.1, 0.8, 5.0], [1.0, 2.0, -1.0, -0.5, -1.5])
    out = policy_objective(made, ratio=level, weight=weight)
    out.token_losses.sum().backward()
    assert live.grad is not None
    coefficient = gradient_coefficient(
        weight, out.metrics["ratio"].log(), made.advantages, logprobs=made.logprobs
    )
    assert torch.allclose(live.grad, -coefficient * made.advantages, atol=1e-9)


@pytest.mark.parametrize(("level", "weight"), COMBINATIONS)
def test_the_coefficients_of_whole_responses(level: str, weight: str):
    """With `response_mask`: tokens outside the mask have the coefficient 0 and no influence."""
    made, live = objective_inputs([0.3, 1.9, 7.0, 0.8, 5.0], [1.0, 2.0, 3.0, -0.5, -1.5])
    mask = torch.tensor([[True, True, False, True, True]])
    made = dataclasses.replace(made, response_mask=mask)
    out = policy_objective(made, ratio=level, weight=weight)
    out.token_losses.sum().backward()
    assert live.grad is not None
    logs = torch.where(mask, out.metrics["ratio"], 1.0).log()
    coefficient = gradient_coefficient(
        weight, logs, made.advantages, logprobs=made.logprobs, response_mask=mask
    )
    assert torch.allclose(live.grad, -coefficient * made.advantages, atol=1e-9)
    assert coefficient[~mask].tolist() == [0.0]


@pytest.mark.parametrize(("level", "weight"), COMBINATIONS)
def test_on_policy_every_objective_has_the_gradient_of_reinforce(level: str, weight: str):
    made, live = objective_inputs([1.0, 1.0, 1.0], [0.5, -2.0, 1.0])
    policy_objective(made, ratio=level, weight=weight).token_losses.sum().backward()
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([-0.5, 2.0, -1.0])


@pytest.mark.parametrize(("level", "weight"), COMBINATIONS)
def test_gradient_flows_through_the_live_policy_alone_and_not_outside_the_mask(
    level: str, weight: str
):
    logprobs, old, advantages = (
        torch.randn(2, 4, generator=torch.Generator().manual_seed(i)).requires_grad_()
        for i in range(3)
    )
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    made = PolicyObjectiveInputs(
        logprobs=logprobs, old_logprobs=old, advantages=advantages, response_mask=mask
    )
    out = policy_objective(made, ratio=level, weight=weight)
    out.token_losses.sum().backward()
    assert old.grad is None
    assert advantages.grad is None
    assert logprobs.grad is not None
    assert (logprobs.grad[~mask] == 0).all()
    assert (out.token_losses[~mask] == 0).all()


@pytest.mark.parametrize(("level", "weight"), COMBINATIONS)
def test_log_ratios_of_80_stay_finite(level: str, weight: str):
    live = torch.tensor([[0.0, -80.0]], requires_grad=True)
    made = PolicyObjectiveInputs(
        logprobs=live,
        old_logprobs=torch.tensor([[-80.0, 0.0]]),
        advantages=torch.tensor([[1.0, -1.0]]),
        response_mask=torch.ones(1, 2, dtype=torch.bool),
    )
    loss = policy_objective(made, ratio=level, weight=weight).token_losses
    loss.sum().backward()
    assert live.grad is not None
    assert loss.isfinite().all()
    assert live.grad.isfinite().all()
