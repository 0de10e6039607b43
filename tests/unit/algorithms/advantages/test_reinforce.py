"""Golden numbers and traps of REINFORCE without a baseline."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages import (
    reinforce_advantages,
)
from tests.support.advantage_examples import inputs


def test_reinforce_is_the_reward_to_go():
    # outcome 1, process rewards 0.5 and 0.25: at t = 0 all of it, 1.75; at t = 1 only what comes
    # from there on, 1.25
    out = reinforce_advantages(inputs([1.0], [0], token_rewards=torch.tensor([[0.5, 0.25]])))
    assert out.advantages.tolist() == [[1.75, 1.25]]
