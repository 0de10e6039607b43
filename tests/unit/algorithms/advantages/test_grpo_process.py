"""Golden numbers and traps of GRPO with process rewards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlsys.algorithms.advantages import (
    grpo_advantages,
    grpo_process_advantages,
)
from tests.support.advantage_examples import inputs


def test_grpo_process_golden():
    # steps at every token, rewards ((0, 1), (0, 0)): mean 1/4,
    # variance (3 * 1/16 + 9/16) / 4 = 3/16, std sqrt(3)/4
    root = 3**0.5
    ends = torch.ones(2, 2, dtype=torch.bool)
    made = inputs(
        [0.0, 0.0], [0, 0], token_rewards=torch.tensor([[0.0, 1.0], [0.0, 0.0]]), step_ends=ends
    )
    out = grpo_process_advantages(made, eps=0.0)
    assert out.advantages.flatten().tolist() == pytest.approx(
        [2 / root, 3 / root, -2 / root, -1 / root]
    )


def test_the_last_step_of_grpo_process_ends_at_the_last_token():
    # one step per response, given at its first token, and a token after it: rewards (1, 0), mean
    # 1/2, std 1/2. A second end at the last token would have made it (1, 0, 0, 0): mean 1/4
    ends = torch.tensor([[True, False], [True, False]])
    process = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    made = inputs([0.0, 0.0], [0, 0], token_rewards=process, step_ends=ends)
    out = grpo_process_advantages(made, eps=0.0)
    assert out.advantages.tolist() == [[1.0, 1.0], [-1.0, -1.0]]


def test_the_outcome_belongs_to_the_last_step_of_grpo_process():
    # steps end at tokens 0 and 1 of three: rewards (0.5, 0.5 + 1) and (0.5, 0.5 + 0): mean 3/4,
    # deviations (-1/4, 3/4), (-1/4, -1/4), variance (1 + 9 + 1 + 1) / 16 / 4 = 3/16
    ends = torch.tensor([[True, True, False]] * 2)
    made = inputs(
        [1.0, 0.0], [0, 0], [3, 3], token_rewards=torch.where(ends, 0.5, 0.0), step_ends=ends
    )
    std = (3 / 16) ** 0.5
    expected = [[0.5 / std, 0.75 / std, 0.75 / std], [-0.5 / std, -0.25 / std, -0.25 / std]]
    for step_ends in (ends, None):
        of = dataclasses.replace(made, step_ends=step_ends)
        found = grpo_process_advantages(of, eps=0.0).advantages
        torch.testing.assert_close(found, torch.tensor(expected))


def test_grpo_process_without_process_rewards_is_grpo():
    made = inputs([1.0, 0.0, 0.5, 2.0], [0, 0, 0, 1], [3, 1, 2, 2])
    assert torch.allclose(
        grpo_process_advantages(made).advantages, grpo_advantages(made).advantages, atol=1e-6
    )
