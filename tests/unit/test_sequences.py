"""Ragged token sequences: lengths, masks, joining, and what they refuse."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from rlsys.data.sequences import TokenSequences

TWO = TokenSequences.of([[1, 2], [1, 2]], [[3, 4, 5], [6]], group_ids=[7, 7])


def test_prompts_and_responses_lie_one_after_the_other():
    assert TWO.token_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 6]
    assert TWO.token_ids.dtype == np.int32
    assert TWO.offsets.tolist() == [0, 5, 8]
    assert TWO.loss_mask.tolist() == [False, False, True, True, True, False, False, True]
    assert TWO.lengths.tolist() == [5, 3]
    assert TWO.loss_lengths.tolist() == [3, 1]
    assert TWO.num_loss_tokens == 4
    assert len(TWO) == 2


def test_holes_of_the_mask_are_not_counted():
    mask = TWO.loss_mask.copy()
    mask[3] = False
    assert replace(TWO, loss_mask=mask).loss_lengths.tolist() == [2, 1]


def test_an_empty_response_has_no_loss_tokens():
    empty = TokenSequences.of([[1, 2], [3]], [[], [4]], group_ids=[0, 1])
    assert empty.lengths.tolist() == [2, 2]
    assert empty.loss_lengths.tolist() == [0, 1]


def test_texts_count_all_but_their_first_token():
    texts = [np.arange(3, dtype=np.int32), np.arange(5, 10, dtype=np.int32)]
    whole = TokenSequences.of_texts(texts)
    assert whole.token_ids.tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert whole.loss_mask.tolist() == [False, True, True, False, True, True, True, True]
    assert whole.group_ids.tolist() == [0, 1]  # no two share a prompt


def test_concatenation_moves_the_offsets():
    other = TokenSequences.of([[8]], [[9]], group_ids=[2])
    joined = TokenSequences.concatenate([TWO, other, TWO])
    assert joined.offsets.tolist() == [0, 5, 8, 10, 15, 18]
    assert joined.loss_lengths.tolist() == [3, 1, 1, 3, 1]
    assert joined.group_ids.tolist() == [7, 7, 2, 7, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"offsets": np.array([0, 5, 7])}, "ends with the last token"),
        ({"offsets": np.array([1, 5, 8])}, "begins at token 0"),
        ({"prompt_lengths": np.array([2, 4], dtype=np.int32)}, "longer than its sequence"),
        ({"prompt_lengths": np.array([0, 2], dtype=np.int32)}, "no predecessor"),
        ({"loss_mask": np.ones(8, dtype=np.bool_)}, "False on prompts"),
    ],
)
def test_broken_sequences_are_refused(change: dict, said: str):
    with pytest.raises(AssertionError, match=said):
        replace(TWO, **change)


def test_every_array_travels_as_a_buffer_of_its_own():
    buffers: list = []
    pickle.dumps(TWO, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 5  # what Ray puts into shared memory without a copy


def test_marks_move_to_the_token_after():
    """Of TWO, mark the last token of each response and the end of the first prompt.

    Each sequence gets one more token: 1 2 3 4 5 (5) and 1 2 6 (6).
    """
    marks = np.array([0, 1, 0, 0, 1, 0, 0, 1], dtype=np.bool_)
    moved = TWO.marked_after(marks)
    assert moved.token_ids.tolist() == [1, 2, 3, 4, 5, 5, 1, 2, 6, 6]
    assert moved.offsets.tolist() == [0, 6, 10]
    assert moved.loss_mask.tolist() == [bool(m) for m in (0, 0, 1, 0, 0, 1, 0, 0, 0, 1)]
    assert moved.prompt_lengths.tolist() == [2, 2]


def test_a_mark_inside_a_prompt_is_refused():
    marks = np.zeros(8, dtype=np.bool_)
    marks[0] = True
    with pytest.raises(ValueError, match="inside a prompt"):
        TWO.marked_after(marks)


def test_rows_are_taken_in_the_given_order():
    sequences = TokenSequences.of([[1, 2], [3], [4]], [[5], [6, 7], []], group_ids=[0, 1, 2])
    taken = sequences.take(np.array([1, 0]))
    assert taken.token_ids.tolist() == [3, 6, 7, 1, 2, 5]
    assert taken.offsets.tolist() == [0, 3, 6]
    assert taken.loss_mask.tolist() == [False, True, True, False, False, True]
    assert taken.group_ids.tolist() == [1, 0]
    assert len(sequences.take(np.array([], dtype=np.int64))) == 0
