"""Golden numbers and traps of the optimal baseline."""

from __future__ import annotations

import pytest
import torch

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    optimal_baseline_advantages,
)
from tests.support.advantage_examples import inputs


def test_optimal_baseline_golden():
    # g^2 = 3 and 1, rewards 1 and 0: b = 3/4; without themselves the baselines are 0 and 1
    made = inputs([1.0, 0.0], [0, 0], squared_score_norms=torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
    assert optimal_baseline_advantages(made).advantages[:, 0].tolist() == [0.25, -0.75]
    assert optimal_baseline_advantages(made, leave_one_out=True).advantages[:, 0].tolist() == [
        1.0,
        -1.0,
    ]


def test_a_large_weight_of_its_own_takes_no_digit_of_the_others_baseline():
    # Without response 0: b = (0 * 1 + 1 * 3) / 4 = 3/4, so A_0 = 1/4; in float32, 1e8 + 4 - 1e8
    # would be 0 or 8.
    # Without response 1: b = (1e8 + 3) / (1e8 + 3) = 1, A_1 = -1.
    # Without response 2: b = 1e8 / (1e8 + 1), A_2 = 1e-8.
    norms = torch.tensor([[1e8], [1.0], [3.0]])
    made = inputs([1.0, 0.0, 1.0], [0, 0, 0], [1, 1, 1], squared_score_norms=norms)
    found = optimal_baseline_advantages(made, leave_one_out=True).advantages[:, 0].tolist()
    assert found == pytest.approx([0.25, -1.0, 1 / (1e8 + 1)], rel=1e-6)


def test_optimal_baseline_over_the_batch_needs_no_group():
    # one response per prompt; g^2 (1, 1, 2), rewards (1, 0, 1): b = 3/4, and without each itself
    # (2/3, 1, 1/2)
    made = inputs(
        [1.0, 0.0, 1.0],
        [0, 1, 2],
        [1, 1, 1],
        squared_score_norms=torch.tensor([[1.0], [1.0], [2.0]]),
    )
    found = optimal_baseline_advantages(made, scope="batch").advantages[:, 0].tolist()
    assert found == pytest.approx([1 / 4, -3 / 4, 1 / 4])
    found = optimal_baseline_advantages(made, scope="batch", leave_one_out=True).advantages[:, 0]
    assert found.tolist() == pytest.approx([1 / 3, -1.0, 1 / 2])


def test_optimal_baseline_minimises_the_variance_it_is_named_after():
    """Sum of g^2 (r - b)^2 over the group rises on both sides of b."""
    rewards, norms = torch.rand(16, dtype=torch.float64), torch.rand(16, 1, dtype=torch.float64)
    made = AdvantageInputs(
        rewards=rewards,
        response_mask=torch.ones(16, 1, dtype=torch.bool),
        group_ids=torch.zeros(16).long(),
        squared_score_norms=norms,
    )
    baseline = rewards - optimal_baseline_advantages(made).advantages[:, 0]
    energy = [
        float((norms[:, 0] * (rewards - baseline - step) ** 2).sum()) for step in (-1e-3, 0.0, 1e-3)
    ]
    assert energy[1] < min(energy[0], energy[2])
