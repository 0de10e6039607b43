"""Golden numbers and traps of GRPO."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    grpo_advantages,
    rloo_advantages,
)
from tests.support.advantage_examples import inputs


def test_grpo_golden_population_standard_deviation():
    # rewards 1, 0, 0, 1: mean 1/2, squared deviations 1/4 each, std sqrt(1/4) = 1/2,
    # advantages (1 - 1/2) / (1/2) = 1
    out = grpo_advantages(inputs([1.0, 0.0, 0.0, 1.0], [7, 7, 7, 7]), eps=0.0)
    assert out.advantages[:, 0].tolist() == [1.0, -1.0, -1.0, 1.0]


def test_grpo_golden_sample_standard_deviation_and_eps():
    # rewards 2, 0: mean 1, ddof 1: variance (1 + 1) / 1 = 2; advantage 1 / (sqrt(2) + 0.5)
    out = grpo_advantages(inputs([2.0, 0.0], [0, 0]), std_ddof=1, eps=0.5)
    assert out.advantages[0, 0].item() == pytest.approx(1 / (2**0.5 + 0.5))


def test_grpo_without_division_is_the_centred_reward():
    # mean of 3, 0, 0 is 1
    out = grpo_advantages(inputs([3.0, 0.0, 0.0], [1, 1, 1]), divide_by_std=False)
    assert out.advantages[:, 0].tolist() == [2.0, -1.0, -1.0]


def test_groups_of_different_sizes_in_any_order():
    out = rloo_advantages(inputs([1.0, 4.0, 0.0, 2.0, 9.0], [3, 8, 3, 8, 1]))
    # group 3: 1, 0 -> 1, -1; group 8: 4, 2 -> 2, -2; group 1 is alone -> 0
    assert out.advantages[:, 0].tolist() == [1.0, 2.0, -1.0, -2.0, 0.0]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5, width=32)), min_size=2, max_size=24),
    st.floats(-10, 10),
    st.floats(0.5, 4),
)
@settings(max_examples=60, deadline=None)
def test_grpo_properties(rows: list[tuple[int, float]], shift: float, scale: float):
    groups, rewards = [g for g, _ in rows], torch.tensor([r for _, r in rows], dtype=torch.float64)
    mask = torch.ones(len(rows), 1, dtype=torch.bool)

    def advantages(values: Tensor, ids: list[int]) -> Tensor:
        made = AdvantageInputs(rewards=values, response_mask=mask, group_ids=torch.tensor(ids))
        return grpo_advantages(made, divide_by_std=False).advantages[:, 0]

    base = advantages(rewards, groups)
    for group in set(groups):
        assert abs(float(base[torch.tensor(groups) == group].sum())) < 1e-9  # each group sums to 0
    assert torch.allclose(advantages(rewards + shift, groups), base, atol=1e-9)
    assert torch.allclose(advantages(rewards * scale, groups), base * scale, atol=1e-9)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        advantages(rewards[order], [groups[i] for i in order]), base[order], atol=1e-9
    )


def test_a_mask_with_a_hole_gets_zero_in_the_hole():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    made = AdvantageInputs(
        rewards=torch.tensor([1.0, 0.0]), response_mask=mask, group_ids=torch.tensor([0, 0])
    )
    assert grpo_advantages(made).advantages[0, 1] == 0


def test_bfloat16_rewards_are_computed_in_float32():
    made = AdvantageInputs(
        rewards=torch.tensor([1.0, 0.0, 0.0], dtype=torch.bfloat16),
        response_mask=torch.ones(3, 1, dtype=torch.bool),
        group_ids=torch.zeros(3, dtype=torch.int64),
    )
    out = grpo_advantages(made).advantages
    assert out.dtype == torch.float32
    assert out[0, 0].item() == pytest.approx((2 / 3) / ((2 / 9) ** 0.5 + 1e-6), rel=1e-6)


def test_grpo_against_a_plain_loop():
    generator = torch.Generator().manual_seed(1)
    rewards, groups = (
        torch.rand(40, generator=generator),
        torch.randint(0, 7, (40,), generator=generator),
    )
    made = AdvantageInputs(
        rewards=rewards, response_mask=torch.ones(40, 3, dtype=torch.bool), group_ids=groups
    )
    fast = grpo_advantages(made, std_ddof=1).advantages[:, 0]
    for i in range(40):
        group = [float(rewards[j]) for j in range(40) if groups[j] == groups[i]]
        mean = sum(group) / len(group)
        if len(group) == 1:
            assert fast[i] == 0
            continue
        std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        assert float(fast[i]) == pytest.approx((float(rewards[i]) - mean) / (std + 1e-6), abs=1e-5)
