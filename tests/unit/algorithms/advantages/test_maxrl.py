"""MaxRL: golden numbers, refusals, and the likelihood that it ascends, exactly."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlsys.algorithms.advantages import maxrl_advantages, run_estimator
from tests.support.advantage_examples import inputs


def test_golden():
    # one of four right: mean 1/4, (1 - 1/4) / (1/4) = 3, (0 - 1/4) / (1/4) = -1
    out = maxrl_advantages(inputs([1.0, 0.0, 0.0, 0.0], [0] * 4))
    assert out.advantages[:, 0].tolist() == [3.0, -1.0, -1.0, -1.0]
    # rewards (2, 1, 0): mean 1
    out = maxrl_advantages(inputs([2.0, 1.0, 0.0], [0] * 3))
    assert out.advantages[:, 0].tolist() == [1.0, 0.0, -1.0]


def test_a_slow_loop_and_mixed_lengths():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 3, (30,), generator=generator).double()
    groups = torch.randint(0, 7, (30,), generator=generator)
    lengths = torch.randint(0, 5, (30,), generator=generator).tolist()
    made = inputs([0.0] * 30, groups.tolist(), lengths)
    made = dataclasses.replace(made, rewards=rewards)
    found = maxrl_advantages(made).advantages
    for i in range(30):
        peers = [float(rewards[j]) for j in range(30) if groups[j] == groups[i]]
        mean = sum(peers) / len(peers)
        wanted = (float(rewards[i]) - mean) / mean if mean else 0.0
        for t in range(found.shape[1]):
            assert float(found[i, t]) == pytest.approx(wanted if t < lengths[i] else 0.0)


def test_groups_without_a_reward_of_equal_rewards_and_of_one_get_exactly_zero():
    made = inputs([0.0, 0.0, 0.1, 0.1, 0.1, 0.7], [0, 0, 1, 1, 1, 2])
    assert (maxrl_advantages(made).advantages == 0).all()


def test_negative_rewards_and_process_rewards_are_refused():
    with pytest.raises(ValueError, match=r"'maxrl' takes rewards in \[0, inf\), and .* has -0.5\."):
        run_estimator("maxrl", inputs([1.0, -0.5], [0, 0]), {})
    made = inputs([1.0, 0.0], [0, 0], token_rewards=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="token_rewards: 'maxrl' is defined for outcome rewards"):
        run_estimator("maxrl", made, {})
