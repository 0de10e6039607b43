"""Golden numbers and traps of RLOO."""

from __future__ import annotations

from rlsys.algorithms.advantages import (
    rloo_advantages,
)
from tests.support.advantage_examples import inputs


def test_rloo_golden():
    # group of 3 with rewards 1, 0, 0: others' means 0, 1/2, 1/2
    out = rloo_advantages(inputs([1.0, 0.0, 0.0], [5, 5, 5]))
    assert out.advantages[:, 0].tolist() == [1.0, -0.5, -0.5]
