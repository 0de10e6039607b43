"""The records that a reward function may take and return.

They hold plain Python values: they are pickled to the processes of the reward pool, which need no
NumPy. Each response is pickled by itself, so they are named tuples, which pickle several times
faster than dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class RewardInput(NamedTuple):
    """One response with everything that is known about it. Read it by field name."""

    completion: str  # the response's text, without special tokens
    ground_truth: str
    prompt: str = ""  # as the model saw it, special tokens included
    problem: str = ""  # as in the data; of a conversation, the last message
    metadata: Mapping[str, Any] = {}  # the other columns of the data
    token_ids: Sequence[int] = ()  # of the response, exactly as sampled
    num_tokens: int = 0  # that the policy sampled
    truncated: bool = False  # cut off at generation.max_tokens


class RewardResult(NamedTuple):
    """A reward with its reason and the extracted answer, for functions that explain themselves."""

    score: float  # the reward
    reason: str = "ok"  # for this reward: one word, which is counted in the metrics
    answer: str | None = None  # as found in the completion
