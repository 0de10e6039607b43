"""The numbers of an evaluation's responses, prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

COMPONENT = "reward_"  # prefix of the columns of the reward functions
# Of the others, the token ids and texts are the largest.
COLUMNS = (
    "group_id",
    "problem_id",
    "metadata",
    "extracted_answer",
    "reward",
    "correct",
    "reason",
    "failure",
    "stop_reason",
    "response_mask",
    "rollout_logprobs",
)


@dataclass(frozen=True, kw_only=True)
class ModelResponses:
    """The responses of one model to P prompts, G samples each.

    **Conventions**: `rewards` and `components` are NaN where a function failed and the reward was
    dropped. `log_probs` are sums over the sampled tokens, of the model's whole distribution.
    """

    places: NDArray[np.int64]  # [P] of the problems in the data, ascending
    problem_ids: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]  # [P] the other columns of the data
    correct: NDArray[np.bool_]  # [P, G]
    answered: NDArray[np.bool_]  # [P, G] an answer was found where the reward looks for it
    truncated: NDArray[np.bool_]  # [P, G]
    failed: NDArray[np.bool_]  # [P, G] a reward function failed
    lengths: NDArray[np.int64]  # [P, G] sampled tokens
    log_probs: NDArray[np.float64]  # [P, G]
    rewards: NDArray[np.float64]  # [P, G]
    components: Mapping[str, NDArray[np.float64]]  # [P, G] by reward function, unweighted
    answers: tuple[tuple[str, ...], ...]  # [P][G] "" where there is none

    def __len__(self) -> int:
        return len(self.places)

    @property
    def samples(self) -> int:
        """Samples per prompt."""
        return self.correct.shape[1]

    @staticmethod
    def of(table: pa.Table) -> ModelResponses:
        """Return the numbers of a table with the columns of `rlsys.data.rollout_files`.

        Its rows are in the order of the prompts.

        Raises:
            ValueError: the prompts do not have equally many samples.
        """
        ids = table["group_id"].to_numpy()
        assert (np.diff(ids) >= 0).all(), "the files are written in the order of the prompts"
        places, counts = np.unique(ids, return_counts=True)
        if len(set(counts.tolist())) != 1:
            raise ValueError(
                f"run.directory: its responses have {counts.min()} to {counts.max()} samples per "
                "prompt. They are of different evaluations: start a new one."
            )
        shape = (len(places), int(counts[0]))
        firsts = np.arange(len(places)) * shape[1]
        answers = table["extracted_answer"].to_pylist()
        return ModelResponses(
            places=places.astype(np.int64),
            problem_ids=tuple(table["problem_id"].take(firsts).to_pylist()),
            metadata=tuple(json.loads(text) for text in table["metadata"].take(firsts).to_pylist()),
            correct=table["correct"].to_numpy().reshape(shape),
            answered=(_texts(table, "reason") != "no_answer").reshape(shape),
            truncated=(_texts(table, "stop_reason") == "length").reshape(shape),
            failed=(_texts(table, "failure") != "").reshape(shape),
            lengths=_list_sums(table["response_mask"]).astype(np.int64).reshape(shape),
            log_probs=_list_sums(table["rollout_logprobs"]).reshape(shape),
            rewards=_numbers(table, "reward").reshape(shape),
            components={
                name.removeprefix(COMPONENT): _numbers(table, name).reshape(shape)
                for name in table.column_names
                if name.startswith(COMPONENT)
            },
            answers=tuple(tuple(answers[first : first + shape[1]]) for first in firsts.tolist()),
        )


def _texts(table: pa.Table, name: str) -> NDArray[np.str_]:
    return np.array(table[name].to_pylist(), dtype=np.str_)


def _numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    return table[name].to_numpy().astype(np.float64)


def _list_sums(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Return the sum of each list; no list is empty, since it includes the prompt's tokens."""
    sums = []
    for chunk in column.chunks:
        if len(chunk) == 0:
            continue
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=False).astype(np.float64)
        sums.append(np.add.reduceat(values[: offsets[-1]], offsets[:-1]))
    return np.concatenate(sums) if sums else np.zeros(0)
