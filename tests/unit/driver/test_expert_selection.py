"""The choice of the responses that expert iteration learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from docs.generate.metrics import documented
from rlsys.config.expert_iteration import ExpertConfig
from rlsys.data.batches import RewardBatch, RolloutBatch, StopReason
from rlsys.driver.expert_selection import Chosen, choose_responses
from tests.support.rollout_examples import random_rollouts, rewards_of, rollouts

# Two problems with the same tokens in sum: [1, 2] + [3, 4] and [1] + [2, 3, 4].
GROUPS = [
    ([1, 2], [[3, 4], [5], [3, 4], [3, 4], [6, 7]]),
    ([1], [[2, 3, 4], [2, 3, 4], [9], [5], [5]]),
]
#          kept     wrong  copy  wrong | kept      copy  kept  wrong wrong
CORRECT = [1, 1, 1, 0, 0, 1, 1, 1, 0, 0]


def sampled() -> RolloutBatch:
    return rollouts(GROUPS, batch_id=7, first_group=40)


def scored(correct: Sequence[float], batch: RolloutBatch) -> RewardBatch:
    values = np.asarray(correct, dtype=np.float32)
    return replace(
        rewards_of(batch), rewards=values, accuracies=values, components={"math": values}
    )


def chosen(correct: Sequence[float] = CORRECT, **settings: bool) -> Chosen:
    batch = sampled()
    return choose_responses(batch, scored(correct, batch), ExpertConfig.model_validate(settings))


def test_correct_responses_are_kept_once_as_the_tokens_that_were_sampled():
    batch = chosen().batch
    assert batch.batch_id == 7
    sequences = batch.sequences
    rows = [row.tolist() for row in np.split(sequences.token_ids, sequences.offsets[1:-1])]
    # Rows 0, 1, 5 and 7: row 2 repeats row 0, row 6 repeats row 5.
    assert rows == [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4], [1, 9]]
    assert sequences.prompt_lengths.tolist() == [2, 2, 1, 1]
    assert sequences.group_ids.tolist() == [40, 40, 41, 41]
    learned = [row.tolist() for row in np.split(sequences.loss_mask, sequences.offsets[1:-1])]
    assert learned == [
        [False, False, True, True],
        [False, False, True],
        [False, True, True, True],
        [False, True],
    ]


def test_all_samples_are_written_with_a_mark_on_the_kept_ones():
    result = chosen()
    assert len(result.sampled) == 10
    assert result.sampled.trained is not None
    assert np.flatnonzero(result.sampled.trained).tolist() == [0, 1, 5, 7]


def test_metrics_count_what_was_kept_and_what_was_a_copy():
    metrics = {name: metric.value for name, metric in chosen().metrics.items()}
    assert metrics["expert/kept_fraction"] == pytest.approx(4 / 10)
    assert metrics["expert/solved_fraction"] == 1
    assert metrics["expert/duplicates"] == 2
    assert metrics["reward/accuracy"] == pytest.approx(6 / 10)
    assert metrics["trained/responses"] == 4
    assert metrics["rollout/responses"] == 10
    batch = sampled()
    surprise = -batch.rollout_logprobs[batch.response_mask]
    assert metrics["rollout/entropy"] == pytest.approx(float(surprise.mean()), rel=1e-6)


def test_copies_count_also_where_they_are_learned():
    result = chosen(deduplicate=False)
    assert len(result.batch) == 6
    assert result.metrics["expert/duplicates"].value == 2


def test_a_wrong_response_does_not_make_a_later_one_a_copy():
    # A reward may depend on more than the tokens; of rows 0 and 2 only row 2 is correct.
    batch = sampled()
    result = choose_responses(batch, scored([0, 0, 1] + [0] * 7, batch), ExpertConfig())
    assert result.sampled.trained is not None
    assert np.flatnonzero(result.sampled.trained).tolist() == [2]
    assert result.metrics["expert/duplicates"].value == 0
    assert result.metrics["expert/solved_fraction"].value == 0.5


def test_a_response_without_a_score_is_not_kept():
    assert len(chosen([float("nan")] * 10).batch) == 0


def test_truncated_responses_are_left_out_where_that_is_wanted():
    batch = sampled()
    stops = np.zeros(10, dtype=np.int8)
    stops[1] = StopReason.LENGTH
    batch = replace(batch, stop_reasons=stops)
    rewards = scored(CORRECT, batch)
    with_ends = choose_responses(batch, rewards, ExpertConfig(keep_truncated=False))
    assert len(with_ends.batch) == 3
    assert len(choose_responses(batch, rewards, ExpertConfig()).batch) == 4


def test_nothing_correct_is_an_empty_batch():
    result = chosen([0] * 10)
    assert len(result.batch) == 0
    assert len(result.batch.sequences.token_ids) == 0
    assert result.metrics["expert/kept_fraction"].value == 0
    assert result.metrics["trained/responses"].value == 0


def test_a_problem_that_comes_twice_in_a_step_is_one_problem():
    batch = rollouts([([1, 2], [[3]]), ([1, 2], [[3]])])
    result = choose_responses(batch, scored([1, 1], batch), ExpertConfig())
    assert len(result.batch) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_agrees_with_a_slow_twin(seed: int):
    """A set of (prompt, response) pairs, over random batches of two tokens with many copies."""
    batch = random_rollouts(seed, groups=3, samples=12, vocabulary=7)
    rewards = rewards_of(batch, seed)
    kept, seen = [], set()
    for row in range(len(batch)):
        start, end = batch.sequence_offsets[row : row + 2]
        middle = start + batch.prompt_lengths[row]
        pair = tuple(batch.token_ids[start:middle]), tuple(batch.token_ids[middle:end])
        if rewards.accuracies[row] >= 0.5 and pair not in seen:
            seen.add(pair)
            kept.append(row)
    result = choose_responses(batch, rewards, ExpertConfig())
    assert result.sampled.trained is not None
    assert np.flatnonzero(result.sampled.trained).tolist() == kept


def test_every_metric_is_documented_with_its_reduction():
    for name, metric in chosen().metrics.items():
        row = documented(name)
        assert row is not None, name
        assert row.reduction == metric.reduction, name
