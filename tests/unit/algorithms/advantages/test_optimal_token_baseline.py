"""Golden numbers and traps of the optimal baseline of each position."""

from __future__ import annotations

import pytest
import torch

from rlsys.algorithms.advantages import (
    optimal_token_baseline_advantages,
)
from tests.support.advantage_examples import inputs


def test_optimal_token_baseline_golden():
    # W = ((1, 2), (1, 4)); b = (1/2, 2/6); advantages ((1/2, 2/3), (-1/2, -1/3))
    out = optimal_token_baseline_advantages(
        inputs([1.0, 0.0], [0, 0], squared_score_norms=torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
    )
    assert out.advantages.flatten().tolist() == pytest.approx([1 / 2, 2 / 3, -1 / 2, -1 / 3])


def test_optimal_token_baseline_without_the_response_itself():
    # three responses, W = (1, 2, 1), rewards (1, 0, 1): without each itself b = (1/3, 1, 1/3)
    norms = torch.tensor([[1.0], [2.0], [1.0]])
    made = inputs([1.0, 0.0, 1.0], [0, 0, 0], [1, 1, 1], squared_score_norms=norms)
    found = optimal_token_baseline_advantages(made, leave_one_out=True).advantages[:, 0].tolist()
    assert found == pytest.approx([2 / 3, -1.0, 2 / 3])


def test_optimal_token_baseline_on_the_tail_of_the_longest_response():
    # Lengths 3, 1, 2; rewards 1, 0, 1; norms 1, and 3 for the second response. Where the first
    # is alone, W of the other responses is 3 and 2, so b = (0 * 3 + 1 * 2) / 5 = 2/5.
    # Before: W (1, 3, 1), b = 2/5; then W (2, -, 2), b = 1, so A = 0 for equal rewards.
    norms = torch.ones(3, 3)
    norms[1] = 3.0
    made = inputs([1.0, 0.0, 1.0], [0, 0, 0], [3, 1, 2], squared_score_norms=norms)
    found = optimal_token_baseline_advantages(made).advantages
    assert found[0].tolist() == pytest.approx([3 / 5, 0.0, 3 / 5])
    assert found[1].tolist() == pytest.approx([-2 / 5, 0.0, 0.0])


def test_process_rewards_after_the_others_end():
    # alone at t = 1: its return is 1 + 0.5, that of the other is its outcome, 0
    made = inputs(
        [1.0, 0.0],
        [0, 0],
        [2, 1],
        squared_score_norms=torch.ones(2, 2),
        token_rewards=torch.tensor([[0.0, 0.5], [0.25, 0.0]]),
    )
    found = optimal_token_baseline_advantages(made).advantages
    # at t = 0 returns 1.5 and 0.25, b = 0.875
    assert found.tolist() == [[0.625, 1.5], [-0.625, 0.0]]
