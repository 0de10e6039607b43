"""End tokens of responses, at which a reward model is read."""

from __future__ import annotations

import numpy as np

from rlsys.data.response_ends import marked_after_last, with_end_tokens
from rlsys.data.sequences import TokenSequences

END, OTHER_END = 9, 8


def of(*responses: list[int]) -> TokenSequences:
    return TokenSequences.of(
        [[1, END]] * len(responses), list(responses), group_ids=[0] * len(responses)
    )


def rows(sequences: TokenSequences) -> list[list[int]]:
    return [part.tolist() for part in np.split(sequences.token_ids, sequences.offsets[1:-1])]


def test_a_response_without_an_end_token_gets_one():
    """Cut off; ended; ended by another end token; empty, after a prompt that ends like an end."""
    ended = with_end_tokens(of([4, 5], [4, END], [OTHER_END], []), {END, OTHER_END}, END)
    assert rows(ended) == [[1, 9, 4, 5, 9], [1, 9, 4, 9], [1, 9, 8], [1, 9, 9]]
    assert ended.offsets.tolist() == [0, 5, 9, 12, 15]
    assert ended.loss_lengths.tolist() == [3, 2, 1, 1]
    assert ended.prompt_lengths.tolist() == [2, 2, 2, 2]


def test_an_end_token_inside_of_a_response_does_not_count():
    assert rows(with_end_tokens(of([END, 4]), {END}, END)) == [[1, 9, 9, 4, 9]]


def test_nothing_is_added_where_all_responses_have_ended():
    sequences = of([4, END], [END])
    ended = with_end_tokens(sequences, {END}, END)
    np.testing.assert_array_equal(ended.token_ids, sequences.token_ids)
    np.testing.assert_array_equal(ended.offsets, sequences.offsets)


def test_one_value_is_read_after_each_last_token():
    """The mark moves by a token, and a token that no model sees follows: see `marked_after`."""
    marked = marked_after_last(of([4, 9], [9]))
    assert rows(marked) == [[1, 9, 4, 9, 9], [1, 9, 9, 9]]
    assert np.flatnonzero(marked.loss_mask).tolist() == [4, 8]
