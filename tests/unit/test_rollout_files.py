"""The rollout file of a step: everything that was sampled, and the trained part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlsys.config import RunConfig
from rlsys.data.batches import ScoredBatch
from rlsys.data.rollout_files import read_rollouts, write_rollouts
from rlsys.run.directory import RunDirectory
from tests.support.rollout_examples import random_rollouts, rewards_of, train_batch


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create(RunConfig())
    return made


def test_the_file_of_a_step_holds_everything_that_was_sampled_and_says_what_was_trained(
    directory: RunDirectory,
):
    """Two responses are masked out and a further group was dropped: those have no advantages."""
    batch = train_batch(random_rollouts(4), 4)
    trained = np.arange(len(batch.rollouts)) >= 2
    rest = random_rollouts(5, groups=1)
    dropped = ScoredBatch(rollouts=rest, rewards=rewards_of(rest))
    path = directory.rollouts / "step_000001.parquet"
    write_rollouts(replace(batch, trained=trained), path, dropped=dropped)
    rows = read_rollouts(path)
    assert [row["trained"] for row in rows] == [*trained, *[False] * len(rest)]
    assert [row["response"] for row in rows] == [
        *batch.rollouts.response_texts,
        *rest.response_texts,
    ]
    split = np.split(batch.advantages, batch.rollouts.sequence_offsets[1:-1])
    for row, own in zip(rows, [*split, *[None] * len(rest)], strict=True):
        expected = own.tolist() if row["trained"] and own is not None else None
        assert row["advantages"] == expected
        assert row["correct"] == (row["accuracy"] >= 0.5)
        assert len(row["token_ids"]) == len(row["rollout_logprobs"])


def test_advantages_that_the_update_estimated_take_their_place(directory: RunDirectory):
    rollouts = random_rollouts(4)
    batch = ScoredBatch(rollouts=rollouts, rewards=rewards_of(rollouts))
    path = directory.rollouts / "step_000001.parquet"
    estimated = np.arange(len(batch.rollouts.token_ids), dtype=np.float32)
    write_rollouts(batch, path, advantages=estimated)
    flat = [value for row in read_rollouts(path) for value in row["advantages"]]
    assert flat == estimated.tolist()
