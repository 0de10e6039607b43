"""Statistics over the responses of a group, in any order."""

import torch

from rlsys.algorithms.advantages.grouping import (
    Groups,
    at_least_float32,
    broadcast_to_tokens,
    others_mean,
    outcome_rewards,
)

# Groups of two, three and one.
IDS = torch.tensor([7, 3, 7, 3, 3, 9])
VALUES = torch.tensor([1.0, 2.0, 10.0, 4.0, 8.0, 5.0])


def test_sums_and_extremes_of_each_group():
    groups = Groups.of(IDS)
    assert groups.spread(groups.counts).tolist() == [2, 3, 2, 3, 3, 1]
    assert groups.spread(groups.total(VALUES)).tolist() == [11, 14, 11, 14, 14, 5]
    assert groups.spread(groups.extreme(VALUES, "amin")).tolist() == [1, 2, 1, 2, 2, 5]
    assert groups.all_equal(torch.tensor([1.0, 0, 1, 0, 1, 4])).tolist() == [
        True,
        False,
        True,
        False,
        False,
        True,
    ]


def test_the_sum_over_the_others_loses_no_digit_to_the_own_value():
    groups = Groups.of(torch.zeros(3, dtype=torch.int64))
    found = groups.others_total(torch.tensor([1e20, 1.0, 2.0], dtype=torch.float64))
    assert found[0] == 3.0  # the total less 1e20 would be 0
    others = Groups.of(IDS).others_total(VALUES)
    assert others.tolist() == [10, 12, 1, 10, 6, 0]


def test_the_mean_of_the_others_of_padded_groups():
    rewards = torch.tensor([[1.0, 3.0, 5.0], [2.0, 4.0, 0.0], [6.0, 0.0, 0.0]])
    present = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    found = others_mean(rewards, present)
    assert found[0].tolist() == [4.0, 3.0, 2.0]
    assert found[1, :2].tolist() == [4.0, 2.0]
    assert found[2, 0] == 6.0  # alone: compared with itself, so it gets 0


def test_a_reward_is_the_outcome_with_its_process_rewards_at_every_token():
    mask = torch.tensor([[True, True], [True, False]])
    process = torch.tensor([[0.5, 0.25], [0.5, 9.0]])
    total = outcome_rewards(torch.tensor([1.0, 2.0]), process, mask)
    assert total.tolist() == [1.75, 2.5]
    assert broadcast_to_tokens(total, mask).tolist() == [[1.75, 1.75], [2.5, 0.0]]


def test_half_precision_is_widened_and_double_stays():
    assert at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
