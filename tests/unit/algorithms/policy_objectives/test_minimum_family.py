"""The smallest of several functions of the ratio."""

import pytest
import torch

from rlsys.algorithms.policy_objectives import (
    check_objective,
    policy_objective,
)
from tests.support.objective_examples import objective_inputs


def test_minimum_of_ratio_and_clip_is_ppo_clip():
    """Values, gradients and what counts as clipped, at ratios on both sides of each edge."""
    ratios, advantages = [0.3, 1.9, 1.1, 0.8, 5.0, 0.1], [1.0, 2.0, -1.0, -0.5, -1.5, -2.0]
    results = []
    for weight in ("minimum", "ppo_clip"):
        made, live = objective_inputs(ratios, advantages)
        out = policy_objective(made, ratio="token", weight=weight)
        out.token_losses.sum().backward()
        assert live.grad is not None
        results.append((out.token_losses, out.metrics["clipped"], live.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([], r"\[\] is not a list of functions"),
        ([{"q": 0.5}], "has no kind. Choose from clip, one, power, ratio, table"),
        ([{"kind": "powr"}], "Did you mean power"),
        ([{"kind": "power", "p": 1}], "power_curve has no such parameter"),
        ([{"kind": "power", "q": 2.0}], "leaves the band between min"),
        ([{"kind": "power", "q": -0.5}], "leaves the band"),
        ([{"kind": "clip", "low": -0.1}], "leaves the band"),
        ([{"kind": "ratio"}, {"kind": "clip", "high": -0.1}], "leaves the band"),
        (
            [{"kind": "table", "ratios_at": [1.0, 2.0, 3.0], "values": [1.0, 1.9, 1.5]}],
            "falls at rho",
        ),
        ([{"kind": "table", "ratios_at": [2.0, 1.0], "values": [1.0, 1.0]}], "ascending"),
        ([{"kind": "one"}], "none of them has a gradient at rho = 1"),
        ([{"kind": "one"}, {"kind": "ratio"}], "List another one first"),
    ],
)
def test_the_general_family_refuses_what_lies_outside_it(functions: list, message: str):
    with pytest.raises(ValueError, match=message) as error:
        check_objective("token", "minimum", {"functions": functions})
    assert "algorithm.objective.parameters.functions" in str(error.value)
