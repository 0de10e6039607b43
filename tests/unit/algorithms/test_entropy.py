"""Entropy in the reward, and its temperature."""

import math

import pytest
import torch

from rlsys.algorithms.entropy import entropy_rewards, tuned_temperature


def test_entropy_rewards_and_temperature_golden():
    mask = torch.tensor([[True, False]])
    assert entropy_rewards(torch.tensor([[-2.0, -9.0]]), mask, 0.1).tolist() == [
        [pytest.approx(0.2), 0.0]
    ]
    # entropy 0.5 below the target of 1: log alpha grows by 0.1 * 0.5
    assert tuned_temperature(0.2, 0.5, target=1.0, learning_rate=0.1) == pytest.approx(
        0.2 * math.exp(0.05)
    )
