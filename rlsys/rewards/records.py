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
    """A reward with its reason, the extracted answer, and the rewards of single steps.

    Only a function that is registered with `steps=True` gives rewards of steps. They are added to
    the score: step k gets `step_rewards[k]` at its last token, and the response gets `score` at the
    end. `step_ends[k]` is the number of characters of the completion up to and with step k, as
    `split_steps` returns it; the ends rise.
    """

    score: float  # the reward of the response as a whole
    reason: str = "ok"  # for this reward: one word, which is counted in the metrics
    answer: str | None = None  # as found in the completion
    step_rewards: Sequence[float] = ()
    step_ends: Sequence[int] = ()
