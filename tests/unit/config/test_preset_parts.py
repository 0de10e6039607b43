"""Presets use registered estimators, ratios and weights."""

import pytest
import torch

from rlsys.algorithms.advantages import get_advantage_estimator
from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    check_objective,
    policy_objective,
)
from rlsys.config.presets import PRESETS
from rlsys.registry import check_parameters
from tests.support.objective_examples import objective_inputs


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_what_exists(name: str):
    preset = PRESETS[name].algorithm
    check_objective(preset.objective.ratio, preset.objective.weight, preset.objective.parameters)
    check_parameters(
        get_advantage_estimator(preset.advantage.name), preset.advantage.parameters, field=""
    )
    made, live = objective_inputs([1.0, 1.0], [1.0, -1.0])
    objective = preset.objective
    policy_objective(
        made, ratio=objective.ratio, weight=objective.weight, **objective.parameters
    ).token_losses.sum().backward()
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([-1.0, 1.0])  # on-policy, each is REINFORCE


def test_luspo_is_the_loss_of_its_paper():
    """1/N sum_i |y_i| min(s_i A_i, clip(s_i) A_i), with s_i differentiated through all tokens."""
    preset = PRESETS["luspo"].algorithm
    assert preset.objective.parameters == {"clip_low": 0.002, "clip_high": 0.0025}
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6)[None, :] < torch.tensor([6, 2, 4, 1, 5, 3, 6, 6])[:, None]
    old = -torch.rand(8, 6, generator=generator, dtype=torch.float64)
    steps = 0.01 * torch.randn(8, 6, generator=generator, dtype=torch.float64)
    live = (old + steps).requires_grad_()
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)

    made = PolicyObjectiveInputs(
        logprobs=live,
        old_logprobs=old,
        advantages=advantages[:, None].expand(8, 6),
        response_mask=mask,
    )
    objective = preset.objective
    out = policy_objective(
        made, ratio=objective.ratio, weight=objective.weight, **objective.parameters
    )
    assert 0 < int(out.metrics["clipped"].sum()) < int(mask.sum())
    (found,) = torch.autograd.grad(aggregate_loss(out.token_losses, mask, preset.aggregation), live)

    lengths = mask.sum(1)
    ratios = (torch.where(mask, live - old, 0.0).sum(1) / lengths).exp()
    clipped = ratios.clamp(1 - 0.002, 1 + 0.0025)
    per_response = torch.minimum(ratios * advantages, clipped * advantages)
    (wanted,) = torch.autograd.grad(-(lengths * per_response).mean(), live)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
