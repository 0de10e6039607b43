"""Batch records: joining, scattering, padding, Parquet."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rlsys.data.batches import LogprobBatch, RewardBatch, RolloutBatch
from rlsys.data.padding import ResponsePadding
from rlsys.data.rollout_files import read_rollouts, write_rollouts
from tests.support.rollout_examples import random_rollouts, rewards_of, rollouts, train_batch


def test_lengths_count_sampled_tokens():
    batch = rollouts([([1, 2], [[3, 4, 5], [6]])], holes={0: [1]})
    assert batch.sequence_lengths.tolist() == [5, 3]
    assert batch.response_lengths.tolist() == [2, 1]
    assert batch.num_response_tokens == 3


def test_concatenation_keeps_every_row():
    one, two = rollouts([([1, 2], [[3], [4, 5]])]), rollouts([([6], [[7]])], first_group=1)
    joined = RolloutBatch.concatenate([one, two])
    assert joined.token_ids.tolist() == [1, 2, 3, 1, 2, 4, 5, 6, 7]
    assert joined.sequence_offsets.tolist() == [0, 3, 7, 9]
    assert joined.group_ids.tolist() == [0, 0, 1]
    assert [prompt.problem_id for prompt in joined.prompts.prompts] == ["p0", "p0"]
    rewards = RewardBatch.concatenate([rewards_of(one), rewards_of(two)])
    assert len(rewards) == 3


def test_a_step_of_several_batches_of_the_stream_has_the_id_of_its_first_part():
    parts = [rollouts([([1], [[2]])], batch_id=9), rollouts([([3], [[4]])], first_group=1)]
    assert RolloutBatch.concatenate(parts).batch_id == 9
    assert RewardBatch.concatenate([rewards_of(part) for part in parts]).batch_id == 9


def test_each_token_has_the_version_of_its_weights():
    parts = [rollouts([([1, 2], [[3], [4, 5]])]), rollouts([([6], [[7]])], first_group=1)]
    newer = np.full(1, 4, dtype=np.int32)
    parts[1] = replace(parts[1], oldest_weight_version=newer, newest_weight_version=newer)
    joined = RolloutBatch.concatenate(parts)
    assert joined.weight_versions.tolist() == [-1, -1, 0, -1, -1, 0, 0, -1, 4]


def test_scatter_puts_rows_of_two_ranks_in_order():
    offsets = np.array([0, 2, 5, 6])
    parts = [
        LogprobBatch(
            batch_id=0, rows=np.array([2, 0]), logprobs=np.array([6.0, 1.0, 2.0], dtype=np.float32)
        ),
        LogprobBatch(
            batch_id=0, rows=np.array([1]), logprobs=np.array([3.0, 4.0, 5.0], dtype=np.float32)
        ),
    ]
    assert LogprobBatch.scatter(parts, offsets).tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(AssertionError, match="exactly one rank"):
        LogprobBatch.scatter(parts[:1], offsets)


def test_padding_round_trip():
    batch = random_rollouts(1)
    padding = ResponsePadding.of(batch.sequences)
    mask = padding.pad(batch.response_mask)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == batch.response_lengths.tolist()
    padded = padding.pad(batch.rollout_logprobs)
    assert (padding.unpad(padded, len(batch.token_ids)) == batch.rollout_logprobs).all()
    first = batch.rollout_logprobs[batch.sequence_offsets[:-1] + batch.prompt_lengths]
    assert (padded[:, 0].numpy() == first).all()  # column 0 is the first token of each response


def test_rollouts_file_is_readable_with_pandas(tmp_path: Path):
    batch = train_batch(random_rollouts(2, groups=2, samples=2))
    path = tmp_path / "step_000001.parquet"
    write_rollouts(batch, path)
    table = pd.read_parquet(path)
    assert (
        table["token_ids"][1].tolist()
        == batch.rollouts.token_ids[slice(*batch.rollouts.sequence_offsets[1:3])].tolist()
    )
    assert table["reward"].tolist() == batch.rewards.rewards.tolist()
    assert table["ground_truth"].tolist() == ["0", "0", "1", "1"]
    assert table["metadata"].tolist() == ['{"of": 0}'] * 2 + ['{"of": 1}'] * 2
    assert read_rollouts(path)[0]["old_logprobs"] is None
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing partial stays
