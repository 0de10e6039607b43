"""What a reward function may take, and what it may return.

Plain Python values: they are pickled to the processes of the reward pool, which need no NumPy. As
each answer travels by itself, they are named tuples, which pickle several times faster than
dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class RewardInput(NamedTuple):
    """One response with everything that is known of it. Read it by field."""

    completion: str  # the response's text, without special tokens
    ground_truth: str
    prompt: str = ""  # as the model saw it, special tokens included
    problem: str = ""  # as the data have it; of a conversation, the last message
    metadata: Mapping[str, Any] = {}  # the other columns of the data
    token_ids: Sequence[int] = ()  # of the response, exactly as sampled
    num_tokens: int = 0  # that the policy sampled
    truncated: bool = False  # cut off at generation.max_tokens


class RewardResult(NamedTuple):
    """A score with its explanation, for functions that have more to say than a number."""

    score: float
    reason: str = "ok"  # why it got this score: one word, which is counted in the metrics
    answer: str | None = None  # as found in the completion
