"""Drift by age, with the arithmetic beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlsys.data.batches import RolloutBatch, ScoredBatch
from rlsys.driver.staleness_metrics import staleness_metrics
from tests.support.rollout_examples import rewards_of, rollouts


def test_effective_sample_size_and_difference_of_each_age() -> None:
    """Version 5 is trained: one response of version 5, one of version 3 with ratios 1 and 3."""
    parts = [rollouts([([1], [[2, 3]])]), rollouts([([4], [[5, 6]])], first_group=1)]
    versions = [np.array([5], dtype=np.int32), np.array([3], dtype=np.int32)]
    batch = RolloutBatch.concatenate(
        [
            replace(part, oldest_weight_version=version, newest_weight_version=version)
            for part, version in zip(parts, versions, strict=True)
        ]
    )
    old = batch.rollout_logprobs.copy()
    old[-1] += np.log(3)
    scored = ScoredBatch(rollouts=batch, rewards=rewards_of(batch), old_logprobs=old)
    found = {name: metric.value for name, metric in staleness_metrics(scored, 5).items()}
    assert found == pytest.approx(
        {
            "staleness/effective_sample_size/0": 1.0,
            "staleness/logprob_difference/0": 0.0,
            "staleness/effective_sample_size/2": (1 + 3) ** 2 / (2 * (1 + 9)),
            "staleness/logprob_difference/2": np.log(3) / 2,
        },
        abs=1e-6,
    )
    assert staleness_metrics(replace(scored, old_logprobs=None), 5) == {}
