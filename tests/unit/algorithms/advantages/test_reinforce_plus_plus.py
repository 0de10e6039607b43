"""Golden numbers and traps of REINFORCE++."""

from __future__ import annotations

from rlsys.algorithms.advantages import (
    reinforce_plus_plus_advantages,
)
from tests.support.advantage_examples import inputs


def test_reinforce_plus_plus_golden():
    # four tokens with returns 1, 1, 0, 0: mean 1/2, std 1/2
    out = reinforce_plus_plus_advantages(inputs([1.0, 0.0], [0, 1]), eps=0.0)
    assert out.advantages.tolist() == [[1.0, 1.0], [-1.0, -1.0]]
    # group means 1 and 5 taken off: 1, -1, 1, -1 over all tokens, std 1
    out = reinforce_plus_plus_advantages(
        inputs([2.0, 0.0, 6.0, 4.0], [0, 0, 1, 1]), group_baseline=True, eps=0.0
    )
    assert out.advantages[:, 0].tolist() == [1.0, -1.0, 1.0, -1.0]
