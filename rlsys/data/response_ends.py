"""The end tokens of responses, at which a reward model is read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from rlsys.data.sequences import TokenSequences


def with_end_tokens(
    sequences: TokenSequences, end_tokens: Collection[int], end: int
) -> TokenSequences:
    """Return the sequences, with the token `end` after each response that has no end token.

    Such a response was cut off, ended with a stop string, or is empty. A reward model has learned
    its scores at end tokens only.

    Args:
        end_tokens: any of them ends a response.

    Example: with end tokens {9} and `end` 9 the responses (4 9) and (4 5) become (4 9) and (4 5 9).
    """
    stops = sequences.offsets[1:]
    is_empty = sequences.lengths == sequences.prompt_lengths
    lacks = is_empty | ~np.isin(sequences.token_ids[stops - 1], list(end_tokens))

    inserted = np.concatenate([[0], np.cumsum(lacks)])
    return replace(
        sequences,
        token_ids=np.insert(sequences.token_ids, stops[lacks], end),
        offsets=sequences.offsets + inserted,
        loss_mask=np.insert(sequences.loss_mask, stops[lacks], True),
    )


def marked_after_last(sequences: TokenSequences) -> TokenSequences:
    """Return sequences on which a value model reads the value after each one's last token.

    See `TokenSequences.marked_after`.
    """
    last = np.zeros(len(sequences.token_ids), dtype=np.bool_)
    last[sequences.offsets[1:] - 1] = True
    return sequences.marked_after(last)
