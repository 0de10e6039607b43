"""Metrics of the samples of a step, with the arithmetic beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlsys.data.batches import (
    FailureKind,
    RewardBatch,
    RewardFailure,
    RolloutBatch,
    ScoredBatch,
    StopReason,
    TrainBatch,
)
from rlsys.driver.batch_metrics import batch_metrics
from rlsys.metrics import values
from tests.support.rollout_examples import rollouts


def scored(first_group: int, lengths: list[list[int]], rewards: list[float]) -> ScoredBatch:
    """Return groups of responses of the given lengths, with their rewards."""
    batch = rollouts(
        [([1, 2], [[3] * length for length in group]) for group in lengths],
        first_group=first_group,
    )
    array = np.asarray(rewards, dtype=np.float32)
    right = (array > 0).astype(np.float32)
    scored_rewards = RewardBatch(
        batch_id=0,
        rewards=array,
        accuracies=right,
        components={"math": array},
        reasons=("ok",) * len(array),
        extracted_answers=("",) * len(array),
    )
    return ScoredBatch(rollouts=batch, rewards=scored_rewards)


def trained_on(batch: ScoredBatch, mask: list[bool] | None = None) -> TrainBatch:
    return TrainBatch(
        rollouts=batch.rollouts,
        rewards=batch.rewards,
        advantages=np.zeros(len(batch.rollouts.token_ids), dtype=np.float32),
        trained=None if mask is None else np.asarray(mask),
    )


def truncated(batch: RolloutBatch, rows: list[int]) -> RolloutBatch:
    reasons = batch.stop_reasons.copy()
    reasons[rows] = StopReason.LENGTH
    return replace(batch, stop_reasons=reasons)


def test_everything_sampled_counts_and_what_was_trained_is_named_so():
    """One group with rewards 1 and -1 is kept, two with -1 and -1 are dropped.

    The accuracy is 1/6, not 1/2.
    """
    kept = scored(0, [[2, 4]], [1.0, -1.0])
    dropped = scored(1, [[6, 6], [1, 5]], [-1.0, -1.0, -1.0, -1.0])
    dropped = replace(dropped, rollouts=truncated(dropped.rollouts, [0, 1]))

    numbers = values(batch_metrics(trained_on(kept), dropped))
    expected = {
        "reward/mean": -4 / 6,
        "reward/accuracy": 1 / 6,
        "reward/component/math": -4 / 6,
        "reward/reason/ok": 6,
        "rollout/responses": 6,
        "rollout/tokens": 24,
        "rollout/response_length": 4,
        "rollout/response_length_max": 6,
        "rollout/truncated_fraction": 2 / 6,
        "rollout/frac_reward_zero_std": 2 / 3,
        "trained/responses": 2,
        "trained/tokens": 6,
        "trained/reward_mean": 0,
        "trained/reward_std": 1,
        "trained/accuracy": 0.5,
        "trained/response_length": 3,
        "trained/truncated_fraction": 0,
        "trained/frac_reward_zero_std": 0,
    }
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)
    assert numbers["reward/std"] == pytest.approx(np.std([1] + [-1] * 5))


def test_masked_responses_are_sampled_and_not_trained():
    """Truncated responses are masked out: one of the first group is left, none of the second."""
    batch = scored(0, [[1, 3], [3, 3]], [1.0, 0.0, 1.0, 1.0])
    numbers = values(batch_metrics(trained_on(batch, [True, False, False, False])))
    assert numbers["rollout/responses"] == 4
    assert numbers["reward/mean"] == 0.75
    assert (numbers["trained/responses"], numbers["trained/tokens"]) == (1, 1)
    assert numbers["trained/reward_mean"] == 1
    assert numbers["trained/frac_reward_zero_std"] == 1  # one group with one response left


def test_with_nothing_trained_there_is_no_mean_of_it():
    batch = scored(0, [[1, 3]], [1.0, 0.0])
    numbers = values(batch_metrics(trained_on(batch, [False, False])))
    assert {name for name in numbers if name.startswith("trained/")} == {
        "trained/responses",
        "trained/tokens",
    }


def failing(rewards: RewardBatch, *kinds: FailureKind) -> RewardBatch:
    """Return the same rewards, with a failure of `math` on each of the first responses."""
    failures = tuple(
        RewardFailure(row=row, function="math", kind=kind, message="no")
        for row, kind in enumerate(kinds)
    )
    return replace(rewards, failures=failures)


def test_failures_are_counted_where_they_happened():
    """They count in kept, dropped and greedy responses of this batch."""
    kept, dropped = scored(0, [[1, 1]], [1.0, 0.0]), scored(1, [[1, 1]], [0.0, 0.0])
    kept = replace(kept, rewards=failing(kept.rewards, "timeout"))
    dropped = replace(dropped, rewards=failing(dropped.rewards, "error", "error"))
    greedy = failing(kept.rewards, "crash", "error")
    numbers = values(batch_metrics(trained_on(kept), dropped, greedy))
    found = (numbers["reward/timeouts"], numbers["reward/errors"], numbers["reward/crashes"])
    assert found == (1, 3, 1)


def test_a_missing_value_is_not_counted():
    """The mean of a component skips NaN; a response with an accuracy of NaN is not correct."""
    batch = scored(0, [[1, 1, 1]], [1.0, 0.0, 1.0])
    partly = np.array([np.nan, 0.5, 1.0], dtype=np.float32)
    rewards = replace(batch.rewards, components={"math": partly}, accuracies=partly)
    assert rewards.correct.tolist() == [False, True, True]
    numbers = values(batch_metrics(trained_on(replace(batch, rewards=rewards))))
    assert numbers["reward/component/math"] == 0.75
    assert numbers["reward/accuracy"] == pytest.approx(2 / 3)
