"""Rewards per token and rewards-to-go along a response."""

import torch

from rlsys.algorithms.advantages.returns import (
    last_tokens,
    reward_to_go,
    step_rewards,
    suffix_sum,
    whitened,
)

# A response of three tokens, one with a hole, and one without tokens.
MASK = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])


def test_the_sum_from_each_token_to_the_end():
    values = torch.tensor([[1.0, 2.0, 4.0]])
    assert suffix_sum(values).tolist() == [[7.0, 6.0, 4.0]]


def test_the_last_token_is_sampled_and_an_empty_response_has_none():
    expected = [[False, False, True], [False, False, True], [False, False, False]]
    assert last_tokens(MASK).tolist() == expected


def test_the_outcome_falls_on_the_last_token_beside_its_process_reward():
    process = torch.tensor([[0.5, 0.0, 0.25], [0.5, 9.0, 0.0], [9.0, 9.0, 9.0]])
    found = step_rewards(torch.tensor([1.0, 2.0, 3.0]), process, MASK)
    assert found.tolist() == [[0.5, 0.0, 1.25], [0.5, 0.0, 2.0], [0.0, 0.0, 0.0]]


def test_a_token_answers_for_what_comes_from_it_on():
    process = torch.tensor([[0.5, 0.0, 0.25], [0.5, 9.0, 0.0], [9.0, 9.0, 9.0]])
    found = reward_to_go(torch.tensor([1.0, 2.0, 3.0]), process, MASK)
    assert found.tolist() == [[1.75, 1.25, 1.25], [2.5, 0.0, 2.0], [0.0, 0.0, 0.0]]
    assert reward_to_go(torch.tensor([1.0, 2.0, 3.0]), None, MASK).tolist() == [
        [1.0, 1.0, 1.0],
        [2.0, 0.0, 2.0],
        [0.0, 0.0, 0.0],
    ]


def test_equal_values_are_whitened_to_exactly_zero():
    # 0.1 * 5 / 5 need not be 0.1 in floating point.
    assert (whitened(torch.full((3, 3), 0.1), MASK, 0.0) == 0).all()
    # (1, 3) over two tokens: mean 2, deviation 1.
    values = torch.tensor([[1.0, 3.0]])
    both = torch.ones(1, 2, dtype=torch.bool)
    assert whitened(values, both, 0.0).tolist() == [[-1.0, 1.0]]
