"""The sequences on which engine and trainer are compared after each weight sync."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SEQUENCES = 4
BEYOND_WINDOW = 32  # tokens that no longer see the beginning of the sequence


def probe_sequences(
    prompts: Sequence[Sequence[int]], *, limit: int, window: int | None
) -> list[NDArray[np.int32]]:
    """Return up to four different prompts, from the shortest to the longest.

    Each has at most `limit` tokens. Where the model has an attention window and `limit` exceeds it,
    one sequence is longer than the window: a prompt, or else several joined. Within the window a
    model with it and one without compute the same, so that shorter sequences would not detect a
    difference.

    Raises:
        ValueError: there are no prompts.
    """
    if not prompts:
        raise ValueError("data.eval: no prompt to compare engine and trainer on. Give some data.")

    different = sorted({tuple(prompt[-limit:]) for prompt in prompts}, key=lambda p: (len(p), p))
    places = np.linspace(0, len(different) - 1, min(SEQUENCES, len(different)))
    chosen = [list(different[round(place)]) for place in places]

    if window is not None and limit > window and max(map(len, chosen)) <= window:
        chosen[-1] = _joined(different, min(limit, window + BEYOND_WINDOW))

    # A first token has no predecessor, so a sequence of one token has nothing to compare.
    long_enough = [sequence for sequence in chosen if len(sequence) > 1]
    return [np.asarray(sequence, dtype=np.int32) for sequence in long_enough or [chosen[-1] * 2]]


def _joined(prompts: Sequence[Sequence[int]], length: int) -> list[int]:
    """Return `length` tokens of the prompts one after the other, longest first, then again."""
    tokens: list[int] = []
    while len(tokens) < length:
        for prompt in reversed(prompts):
            tokens += prompt
            if len(tokens) >= length:
                break
    return tokens[:length]
