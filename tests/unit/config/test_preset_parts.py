"""Presets use registered estimators, ratios and weights."""

import pytest

from rlsys.algorithms.advantages import get_advantage_estimator
from rlsys.algorithms.policy_objectives import (
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
