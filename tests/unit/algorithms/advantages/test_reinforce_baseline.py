"""Golden numbers and traps of REINFORCE with one baseline for the batch."""

from __future__ import annotations

import dataclasses

from rlsys.algorithms.advantages import (
    reinforce_baseline_advantages,
)
from tests.support.advantage_examples import inputs


def test_reinforce_baseline_golden():
    # batch mean of 1, 0, 0, 1 is 1/2
    out = reinforce_baseline_advantages(inputs([1.0, 0.0, 0.0, 1.0], [0, 0, 1, 1]))
    assert out.advantages[:, 0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_moving_average_is_of_past_batches():
    made = inputs([1.0, 0.0], [0, 0])
    first = reinforce_baseline_advantages(made, baseline="moving_average", decay=0.5)
    assert first.advantages[:, 0].tolist() == [1.0, 0.0]  # nothing is past: no baseline
    # after the batch: average 0.5 * 0 + 0.5 * 0.5 = 0.25, weight 0.5,
    # so the next baseline is 0.25 / 0.5 = 0.5
    second = reinforce_baseline_advantages(
        dataclasses.replace(made, state=first.state), baseline="moving_average", decay=0.5
    )
    assert second.advantages[:, 0].tolist() == [0.5, -0.5]
    assert second.state == {"average": 0.5 * 0.25 + 0.25, "weight": 0.75}
