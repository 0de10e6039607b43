"""The sequences on which engine and trainer are compared."""

import numpy as np
import pytest

from rlsys.data.probe import BEYOND_WINDOW, probe_sequences


def prompts(*lengths: int) -> list[list[int]]:
    """Return prompts of these lengths, all different."""
    return [[100 * number + place for place in range(n)] for number, n in enumerate(lengths)]


def test_whole_different_prompts_from_the_shortest_to_the_longest():
    given = prompts(9, 30, 5, 12, 20, 7, 9)
    chosen = probe_sequences([*given, *given], limit=100, window=None)
    assert [len(sequence) for sequence in chosen] == [5, 9, 12, 30]
    assert all(sequence.tolist() in given for sequence in chosen)
    assert {sequence.dtype for sequence in chosen} == {np.dtype(np.int32)}


def test_one_sequence_outgrows_the_window_where_the_limit_lets_it():
    given = prompts(9, 30, 5)
    assert max(map(len, probe_sequences(given, limit=100, window=20))) == 30  # a prompt does
    joined = probe_sequences(given, limit=100, window=40)[-1]
    assert len(joined) == 40 + BEYOND_WINDOW
    assert joined[:39].tolist() == given[1] + given[0]  # the longest prompts first
    assert len(probe_sequences(given, limit=50, window=40)[-1]) == 50
    assert max(map(len, probe_sequences(given, limit=40, window=40))) == 30  # nothing can outgrow


def test_few_or_long_prompts():
    (alone,) = probe_sequences([[7]], limit=9, window=None)
    assert alone.tolist() == [7, 7]  # a log-probability needs a token before it
    (cut,) = probe_sequences(prompts(9), limit=4, window=None)
    assert cut.tolist() == [5, 6, 7, 8]
    with pytest.raises(ValueError, match=r"data\.eval: no prompt"):
        probe_sequences([], limit=9, window=None)
