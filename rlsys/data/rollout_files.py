"""One step's rollouts as a Parquet file, readable with pyarrow or pandas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from rlsys.data.batches import StopReason, TrainBatch


def write_rollouts(batch: TrainBatch, path: Path) -> None:
    """Write a row for each response: texts, tokens, log-probabilities, rewards, advantages. Token arrays cover prompt and response."""
    rollouts, rewards = batch.rollouts, batch.rewards
    position = {int(group): i for i, group in enumerate(rollouts.prompts.group_ids)}
    prompts = [rollouts.prompts.prompts[position[int(group)]] for group in rollouts.group_ids]

    def ragged(values: NDArray | None) -> pa.Array:
        if values is None:
            return pa.nulls(len(rollouts), pa.list_(pa.float32()))
        return pa.ListArray.from_arrays(
            pa.array(rollouts.sequence_offsets.astype(np.int32)), pa.array(values)
        )

    columns = {
        "batch_id": pa.array([rollouts.batch_id] * len(rollouts)),
        "group_id": pa.array(rollouts.group_ids),
        "problem_id": pa.array([prompt.problem_id for prompt in prompts]),
        "prompt": pa.array([prompt.text for prompt in prompts]),
        "response": pa.array(rollouts.response_texts),
        "ground_truth": pa.array([prompt.ground_truth for prompt in prompts]),
        "extracted_answer": pa.array(rewards.extracted_answers),
        "reward": pa.array(rewards.rewards),
        "accuracy": pa.array(rewards.accuracies),
        "reason": pa.array(rewards.reasons),
        **{f"reward_{name}": pa.array(values) for name, values in rewards.components.items()},
        "stop_reason": pa.array(
            [StopReason(reason).name.lower() for reason in rollouts.stop_reasons]
        ),
        "weight_version": pa.array(rollouts.newest_weight_version),
        "prompt_length": pa.array(rollouts.prompt_lengths),
        "token_ids": ragged(rollouts.token_ids),
        "response_mask": ragged(rollouts.response_mask),
        "rollout_logprobs": ragged(rollouts.rollout_logprobs),
        "old_logprobs": ragged(batch.old_logprobs),
        "ref_logprobs": ragged(batch.ref_logprobs),
        "advantages": ragged(batch.advantages),
    }
    partial = path.with_name(f".{path.name}.partial")
    pyarrow.parquet.write_table(pa.table(columns), partial)
    partial.rename(path)


def read_rollouts(path: Path) -> list[dict]:
    """The rows of a file written by `write_rollouts`."""
    return pyarrow.parquet.read_table(path).to_pylist()
