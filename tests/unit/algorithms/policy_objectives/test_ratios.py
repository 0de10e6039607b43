"""Levels of the probability ratio."""

import pytest

from rlsys.algorithms.policy_objectives import (
    policy_objective,
)
from tests.support.objective_examples import objective_inputs


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [2.0, 0.5, 4.0]),
        ("sequence", [4 ** (1 / 3)] * 3),  # product 4, geometric mean over 3
        ("future", [4 ** (1 / 3), 2 ** (1 / 2), 4.0]),
        ("prefix", [2.0, 1.0, 4.0]),
        ("product", [4.0] * 3),
    ],
)
def test_ratio_levels_golden(level: str, expected: list[float]):
    made, _ = objective_inputs([2.0, 0.5, 4.0], [1.0, 1.0, 1.0])
    out = policy_objective(made, ratio=level, weight="importance")
    assert out.metrics["ratio"][0].tolist() == pytest.approx(expected)
