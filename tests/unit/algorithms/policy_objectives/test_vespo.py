"""VESPO: golden gates on the ratio of a whole response."""

from __future__ import annotations

import math

import pytest
import torch

from rlsys.algorithms.policy_objectives import (
    check_objective,
    gradient_coefficient,
    policy_objective,
)
from tests.support.objective_examples import objective_inputs


@pytest.mark.parametrize(
    ("ratio", "positive", "negative"),
    [
        (1.0, 1.0, 1.0),
        (2.0, 4 * math.exp(-3), 8 * math.exp(-2)),  # W^2 e^(3 (1 - W)), W^3 e^(2 (1 - W))
        (0.5, 0.25 * math.exp(1.5), 0.125 * math.exp(1.0)),
        (1e-3, 1e-6 * math.exp(3 * 0.999), 1e-9 * math.exp(2 * 0.999)),
        (100.0, 1e4 * math.exp(-297), 1e6 * math.exp(-198)),
    ],
)
def test_golden(ratio: float, positive: float, negative: float):
    logs = torch.full((2,), math.log(ratio), dtype=torch.float64)
    found = gradient_coefficient("vespo", logs, torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([positive, negative], rel=1e-12)


def test_the_gate_is_that_of_the_product_at_every_token():
    # token ratios 2, 1/2, 3: W = 3, gate 9 e^-6 for A > 0
    made, live = objective_inputs([2.0, 0.5, 3.0], [1.0, 2.0, 1.0])
    policy_objective(made, ratio="product", weight="vespo").token_losses.sum().backward()
    gate = 9 * math.exp(-6)
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([-gate, -2 * gate, -gate])


def test_the_gate_is_largest_at_k_over_lambda_and_vanishes_far_away():
    logs = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    for sign, best in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        gates = gradient_coefficient("vespo", logs, torch.full_like(logs, sign))
        assert float(logs[gates.argmax()].exp()) == pytest.approx(best, rel=2e-3)
    far = gradient_coefficient("vespo", torch.tensor([80.0, -80.0]), torch.ones(2))
    assert far[0] == 0.0
    assert 0 <= far[1] < 1e-15


def test_refusals():
    with pytest.raises(ValueError, match=r"parameters\.lambda_neg: -1.0 is outside"):
        check_objective("product", "vespo", {"lambda_neg": -1.0})
    with pytest.raises(ValueError, match=r"ratio: 'token' with weight 'vespo'.*ratio product"):
        check_objective("token", "vespo", {})
