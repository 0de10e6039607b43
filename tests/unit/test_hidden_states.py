"""Hidden states of several ranks, looked up by position."""

import numpy as np
import pytest
import torch

from rlsys.data.hidden_states import HiddenStates, JoinedStates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_all_ranks_are_found_by_position(dtype: torch.dtype):
    states = torch.arange(8.0).reshape(4, 2).to(dtype)
    first = HiddenStates.of(0, np.array([5, 2]), states[:2])
    second = HiddenStates.of(0, np.array([3, 6]), states[2:])
    joined = JoinedStates([first, None, second], 8)

    found = joined.take(np.array([2, 3, 6, 5, 2]))
    assert found.dtype == dtype
    assert found.tolist() == states[[1, 2, 3, 0, 1]].tolist()


def test_a_position_without_a_state_is_an_error():
    joined = JoinedStates([HiddenStates.of(0, np.array([1]), torch.zeros(1, 2))], 3)
    with pytest.raises(AssertionError, match="has no hidden state"):
        joined.take(np.array([2]))
