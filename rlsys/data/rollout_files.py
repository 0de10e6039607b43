"""One step's rollouts as a Parquet file, readable with pyarrow or pandas.

Each response that was sampled in the step has a row. `trained` is true for those that entered the
loss: not for those that dynamic sampling dropped, and not for those that are masked out. Only
trained responses have advantages; dropped ones have no `old` and no `ref` log-probabilities, values
and returns either. Values and returns are there where a critic runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from rlsys.data.batches import RewardBatch, ScoredBatch, StopReason, TrainBatch

# Columns of the responses that were kept; null for the others.
OF_KEPT = ("old_logprobs", "ref_logprobs", "values", "returns", "advantages")


def write_rollouts(
    batch: ScoredBatch,
    path: Path,
    *,
    dropped: ScoredBatch | None = None,
    advantages: NDArray[np.float32] | None = None,
) -> None:
    """Write a row for each response: texts, tokens, log-probabilities, rewards, advantages.

    Token arrays cover prompt and response. `dropped` are responses that were sampled and not kept.
    `advantages` `[N]` are those that the update estimated itself, for a batch that has none; NaN
    where it estimated none.
    """
    trained = batch.trained
    if trained is None:
        trained = np.ones(len(batch.rollouts), dtype=np.bool_)
    if advantages is None and isinstance(batch, TrainBatch):
        advantages = batch.advantages

    returns = batch.returns if isinstance(batch, TrainBatch) and batch.values is not None else None

    offsets = batch.rollouts.sequence_offsets
    kept = sample_columns(batch) | {
        "trained": pa.array(trained),
        "old_logprobs": _ragged(offsets, batch.old_logprobs),
        "ref_logprobs": _ragged(offsets, batch.ref_logprobs),
        "values": _ragged(offsets, batch.values),
        "returns": _ragged(offsets, returns),
        "advantages": _ragged(offsets, advantages, trained),
    }
    tables = [pa.table(kept)]

    if dropped is not None:
        nothing = _ragged(dropped.rollouts.sequence_offsets, None)
        columns = sample_columns(dropped) | {
            "trained": pa.array(np.zeros(len(dropped), dtype=np.bool_)),
            **dict.fromkeys(OF_KEPT, nothing),
        }
        tables.append(pa.table(columns))

    write_table_whole(pa.concat_tables(tables), path)


def write_table_whole(table: pa.Table, path: Path) -> None:
    """Write a Parquet file atomically: a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    pyarrow.parquet.write_table(table, partial)
    partial.rename(path)


def sample_columns(batch: ScoredBatch) -> dict[str, pa.Array]:
    """Return the columns that every sampled response has."""
    rollouts = batch.rollouts
    rewards = batch.rewards
    offsets = rollouts.sequence_offsets
    position = {int(group): i for i, group in enumerate(rollouts.prompts.group_ids)}
    prompts = [rollouts.prompts.prompts[position[int(group)]] for group in rollouts.group_ids]
    return {
        "batch_id": pa.array([rollouts.batch_id] * len(rollouts)),
        "group_id": pa.array(rollouts.group_ids),
        "problem_id": _texts([prompt.problem_id for prompt in prompts]),
        "prompt": _texts([prompt.text for prompt in prompts]),
        "response": _texts(rollouts.response_texts),
        "ground_truth": _texts([prompt.ground_truth for prompt in prompts]),
        "metadata": pa.array([json.dumps(prompt.metadata, default=str) for prompt in prompts]),
        "extracted_answer": _texts(rewards.extracted_answers),
        "reward": pa.array(rewards.rewards),
        "accuracy": pa.array(rewards.accuracies),
        "correct": _correct(rewards),
        "reason": _texts(rewards.reasons),
        "failure": _texts(_failures(rewards)),
        **{f"reward_{name}": pa.array(values) for name, values in rewards.components.items()},
        **_step_columns(rewards),
        "stop_reason": pa.array(
            [StopReason(reason).name.lower() for reason in rollouts.stop_reasons]
        ),
        "weight_version": pa.array(rollouts.newest_weight_version),
        "prompt_length": pa.array(rollouts.prompt_lengths),
        "token_ids": _ragged(offsets, rollouts.token_ids),
        "response_mask": _ragged(offsets, rollouts.response_mask),
        "rollout_logprobs": _ragged(offsets, rollouts.rollout_logprobs),
    }


def _texts(values: Sequence[str]) -> pa.Array:
    """Return texts with escapes for lone surrogates, which Parquet cannot hold."""
    return pa.array([text.encode(errors="backslashreplace").decode() for text in values])


def _step_columns(rewards: RewardBatch) -> dict[str, pa.Array]:
    """Return the ends and rewards of the steps; null where the function failed."""
    columns = {}
    for name, steps in rewards.step_rewards.items():
        given = ~np.isnan(rewards.components[name])
        columns[f"step_ends_{name}"] = _ragged(steps.offsets, steps.ends, given)
        columns[f"step_rewards_{name}"] = _ragged(steps.offsets, steps.rewards, given)
    return columns


def _ragged(
    offsets: NDArray[np.int64], values: NDArray | None, present: NDArray[np.bool_] | None = None
) -> pa.Array:
    """Return flat values as one list per response; null without values or where not `present`."""
    if values is None:
        return pa.nulls(len(offsets) - 1, pa.list_(pa.float32()))
    absent = None if present is None else pa.array(~present)
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(values), mask=absent
    )


def _correct(rewards: RewardBatch) -> pa.Array:
    """Return which responses are right; null where the rewards say neither right nor wrong."""
    if not rewards.has_accuracy:
        return pa.nulls(len(rewards), pa.bool_())
    return pa.array(rewards.correct)


def _failures(rewards: RewardBatch) -> list[str]:
    """Return [B] the reward functions that failed on a response, with reasons; "" where none did.

    Their components are NaN.
    """
    texts: list[list[str]] = [[] for _ in range(len(rewards))]
    for failure in rewards.failures:
        texts[failure.row].append(f"{failure.function}: {failure.kind}, {failure.message}")
    return ["; ".join(text) for text in texts]


def read_rollouts(path: Path) -> list[dict]:
    """Return the rows of a file written by `write_rollouts`."""
    return pyarrow.parquet.read_table(path).to_pylist()
