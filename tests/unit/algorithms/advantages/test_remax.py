"""Golden numbers and traps of ReMax."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages import (
    remax_advantages,
)
from tests.support.advantage_examples import inputs


def test_remax_golden():
    made = inputs([1.0, 0.0], [0, 0], greedy_rewards=torch.tensor([0.25, 0.25]))
    assert remax_advantages(made).advantages[:, 0].tolist() == [0.75, -0.25]
