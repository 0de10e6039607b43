"""Golden numbers and traps of OPO."""

from __future__ import annotations

from rlsys.algorithms.advantages import (
    opo_advantages,
)
from tests.support.advantage_examples import inputs


def test_opo_golden():
    # lengths 1 and 3, rewards 1 and 0: b = 1/4
    assert opo_advantages(inputs([1.0, 0.0], [0, 0], [1, 3])).advantages[:, 0].tolist() == [
        0.75,
        -0.25,
    ]
