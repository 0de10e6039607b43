"""From rollouts through Parquet files to the numbers of an evaluation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet

from rlsys.data.batches import RolloutBatch, StopReason
from rlsys.data.response_files import ResponseFiles, ScoredResponses
from rlsys.evaluation.responses import ModelResponses
from tests.support.rollout_examples import rewards_of, rollouts


def group(place: int, lengths: list[int]) -> ScoredResponses:
    """Return the samples of one prompt, with responses of these lengths."""
    prompt = list(range(5, 8 + place))
    batch = rollouts([(prompt, [[9] * n for n in lengths])], first_group=place)
    reasons = np.array([StopReason.LENGTH] + [StopReason.END] * (len(lengths) - 1), dtype=np.int8)
    batch = replace(batch, stop_reasons=reasons)
    rewards = replace(
        rewards_of(batch, seed=place),
        reasons=("no_answer",) + ("wrong",) * (len(lengths) - 1),
        extracted_answers=("",) + ("7",) * (len(lengths) - 1),
    )
    return ScoredResponses(rollouts=batch, rewards=rewards)


def log_prob(batch: RolloutBatch, row: int) -> float:
    """Return the sum of the log-probabilities of one response."""
    start, end = batch.sequence_offsets[row], batch.sequence_offsets[row + 1]
    mask = batch.response_mask[start:end]
    return float(batch.rollout_logprobs[start:end][mask].astype(np.float64).sum())


def test_the_numbers_are_those_of_the_rollouts(tmp_path: Path):
    files = ResponseFiles(tmp_path / "model")
    files.create({"seed": 3})
    groups = [group(0, [2, 5]), group(2, [1, 4]), group(3, [3, 3])]
    files.write(0, [groups[1], groups[0]])  # as they finish
    files.write(1, groups[2:])
    assert files.origin() == {"seed": 3}
    assert [files.prompts_in(part) for part in range(3)] == [2, 1, 0]

    table = files.read()
    assert table is not None
    found = ModelResponses.of(table)
    assert pyarrow.parquet.read_table(files.directory).num_rows == 6  # as pandas reads it
    assert found.places.tolist() == [0, 2, 3]
    assert found.samples == 2
    assert found.lengths.tolist() == [[2, 5], [1, 4], [3, 3]]
    assert found.truncated.tolist() == [[True, False]] * 3
    assert found.answered.tolist() == [[False, True]] * 3
    assert found.answers == (("", "7"),) * 3
    assert found.metadata == ({"of": 0},) * 3
    for prompt, one in enumerate(groups):
        assert found.correct[prompt].tolist() == one.rewards.correct.tolist()
        assert found.components["math"][prompt].tolist() == one.rewards.rewards.tolist()
        expected = [log_prob(one.rollouts, row) for row in range(2)]
        np.testing.assert_allclose(found.log_probs[prompt], expected, rtol=1e-6)


def test_only_the_chosen_columns_are_read(tmp_path: Path):
    files = ResponseFiles(tmp_path / "model")
    assert files.read() is None
    files.create({})
    files.write(0, [group(0, [1, 2])])
    table = files.read(lambda names: [name for name in names if name.startswith("reward")])
    assert table is not None
    assert table.column_names == ["reward", "reward_math"]
    (part,) = (tmp_path / "model").glob("part_*.parquet")
    assert {"response", "token_ids", "rollout_logprobs"} <= set(
        pyarrow.parquet.read_schema(part).names
    )
