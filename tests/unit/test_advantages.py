"""Advantage estimators: golden numbers, properties, traps."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    available_advantage_estimators,
    compares_group,
    estimator_needs,
    gae_advantages,
    get_advantage_estimator,
    gpg_advantages,
    grpo_advantages,
    grpo_process_advantages,
    opo_advantages,
    optimal_baseline_advantages,
    optimal_token_baseline_advantages,
    reinforce_advantages,
    reinforce_baseline_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    rloo_advantages,
    run_estimator,
    token_kl_grpo_advantages,
)
from rlsys.algorithms.advantages.token_kl_grpo import token_kl_returns


def inputs(
    rewards: list[float], groups: list[int], lengths: list[int] | None = None, **more: Any
) -> AdvantageInputs:
    lengths = lengths or [2] * len(rewards)
    mask = torch.arange(max(max(lengths), 1))[None, :] < torch.tensor(lengths)[:, None]
    return AdvantageInputs(
        rewards=torch.tensor(rewards), response_mask=mask, group_ids=torch.tensor(groups), **more
    )


def test_grpo_golden_population_standard_deviation():
    # rewards 1, 0, 0, 1: mean 1/2, squared deviations 1/4 each, std sqrt(1/4) = 1/2, advantages (1 - 1/2) / (1/2) = 1
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


def test_rloo_golden():
    # group of 3 with rewards 1, 0, 0: others' means 0, 1/2, 1/2
    out = rloo_advantages(inputs([1.0, 0.0, 0.0], [5, 5, 5]))
    assert out.advantages[:, 0].tolist() == [1.0, -0.5, -0.5]


def test_reinforce_is_the_reward_to_go():
    # outcome 1, process rewards 0.5 and 0.25: at t = 0 all of it, 1.75; at t = 1 only what comes from there on, 1.25
    out = reinforce_advantages(inputs([1.0], [0], token_rewards=torch.tensor([[0.5, 0.25]])))
    assert out.advantages.tolist() == [[1.75, 1.25]]


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


def full_inputs(
    rewards: list[float],
    groups: list[int],
    mask: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdvantageInputs:
    """Every optional array filled with noise, also outside the mask: an estimator must not look there."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(mask.shape, generator=generator).to(dtype)

    return AdvantageInputs(
        rewards=torch.tensor(rewards, dtype=dtype),
        response_mask=mask,
        group_ids=torch.tensor(groups),
        token_rewards=noise(),
        rollout_logprobs=noise(),
        old_logprobs=noise(),
        ref_logprobs=noise(),
        values=noise(),
        score_norms=noise().abs(),
        greedy_rewards=torch.ones(len(rewards), dtype=dtype) / 4,
        truncated=torch.arange(len(rewards)) % 2 == 0,
        kl_coefficient=0.5,
    )


def padded(made: AdvantageInputs, columns: int) -> AdvantageInputs:
    """The same batch with `columns` more, masked out and full of large numbers."""

    def wider(values: Tensor | None, fill: float) -> Tensor | None:
        return (
            None
            if values is None
            else torch.cat(
                [values, torch.full((len(values), columns), fill).to(values.dtype)], dim=1
            )
        )

    arrays = {name: wider(getattr(made, name), 1e4) for name in TOKEN_ARRAYS}
    mask = wider(made.response_mask, 0.0)
    assert mask is not None
    return dataclasses.replace(made, response_mask=mask, **arrays)


TOKEN_ARRAYS = (
    "token_rewards",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "score_norms",
)
RAGGED = torch.tensor(
    [
        [True, True, True, True],
        [True, False, True, False],
        [True, False, False, False],
        [False] * 4,
        [True, True, False, False],
    ]
)  # a full response, a hole, a response of one token, an empty one, and one that is alone in its group
RAGGED_REWARDS, RAGGED_GROUPS = [1.0, 0.0, 0.5, 0.25, 1.0], [3, 3, 3, 3, 9]


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_zero_outside_the_mask_and_padding_changes_nothing(name: str):
    narrow = full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED)
    estimator = get_advantage_estimator(name)
    a, b = estimator(narrow).advantages, estimator(padded(narrow, 3)).advantages
    assert a.isfinite().all()
    assert (a[~RAGGED] == 0).all()
    assert torch.allclose(a, b[:, :4], atol=1e-6)
    assert (b[:, 4:] == 0).all()


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_the_order_of_responses_does_not_matter(name: str):
    made = full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED)
    order = torch.tensor([4, 2, 0, 3, 1])
    arrays = {field: getattr(made, field)[order] for field in (*TOKEN_ARRAYS, *RESPONSE_ARRAYS)}
    estimator = get_advantage_estimator(name)
    assert torch.allclose(
        estimator(dataclasses.replace(made, **arrays)).advantages,
        estimator(made).advantages[order],
        atol=1e-6,
    )


RESPONSE_ARRAYS = ("rewards", "response_mask", "group_ids", "greedy_rewards", "truncated")


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_bfloat16_is_computed_in_float32_and_float64_stays(name: str):
    estimator = get_advantage_estimator(name)
    half = full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED, dtype=torch.bfloat16)
    arrays = {
        field: getattr(half, field).float()
        for field in (*TOKEN_ARRAYS, "rewards", "greedy_rewards")
    }
    out = estimator(half).advantages
    assert out.dtype == torch.float32
    assert torch.equal(out, estimator(dataclasses.replace(half, **arrays)).advantages)
    double = full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED, dtype=torch.float64)
    assert estimator(double).advantages.dtype == torch.float64


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_equal_rewards_and_groups_of_one_get_exactly_zero_where_groups_are_compared(name: str):
    # 0.1 * 3 / 3 != 0.1 in floating point: the mean of equal rewards is not that reward
    norms = torch.tensor([[0.3, 0.1], [0.7, 0.2], [0.9, 0.4], [0.2, 0.2]])
    zeros = torch.zeros(4, 2)
    made = inputs(
        [0.1, 0.1, 0.1, 0.7],
        [0, 0, 0, 1],
        score_norms=norms,
        rollout_logprobs=norms * 0.9,
        old_logprobs=norms,
        ref_logprobs=norms,
        values=zeros,
        greedy_rewards=zeros[:, 0],
    )
    assert bool((get_advantage_estimator(name)(made).advantages == 0).all()) == compares_group(name)


def test_needs_are_declared():
    assert estimator_needs("grpo") == frozenset()
    assert estimator_needs("token_kl_grpo") == {"old_logprobs", "ref_logprobs"}
    for name in available_advantage_estimators():
        for need in estimator_needs(name):
            made = dataclasses.replace(
                full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED), **{need: None}
            )
            with pytest.raises(ValueError, match=f"'{name}' needs {need}"):
                run_estimator(name, made, {})
            with pytest.raises(AssertionError, match=need):
                get_advantage_estimator(name)(made)


def test_reinforce_baseline_golden():
    # batch mean of 1, 0, 0, 1 is 1/2
    out = reinforce_baseline_advantages(inputs([1.0, 0.0, 0.0, 1.0], [0, 0, 1, 1]))
    assert out.advantages[:, 0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_moving_average_is_of_past_batches():
    made = inputs([1.0, 0.0], [0, 0])
    first = reinforce_baseline_advantages(made, baseline="moving_average", decay=0.5)
    assert first.advantages[:, 0].tolist() == [1.0, 0.0]  # nothing is past: no baseline
    # after the batch: average 0.5 * 0 + 0.5 * 0.5 = 0.25, weight 0.5, so the next baseline is 0.25 / 0.5 = 0.5
    second = reinforce_baseline_advantages(
        dataclasses.replace(made, state=first.state), baseline="moving_average", decay=0.5
    )
    assert second.advantages[:, 0].tolist() == [0.5, -0.5]
    assert second.state == {"average": 0.5 * 0.25 + 0.25, "weight": 0.75}


def test_optimal_baseline_golden():
    # g^2 = 3 and 1, rewards 1 and 0: b = 3/4; without themselves the baselines are 0 and 1
    made = inputs([1.0, 0.0], [0, 0], score_norms=torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
    assert optimal_baseline_advantages(made).advantages[:, 0].tolist() == [0.25, -0.75]
    assert optimal_baseline_advantages(made, leave_one_out=True).advantages[:, 0].tolist() == [
        1.0,
        -1.0,
    ]


def test_a_large_weight_of_its_own_takes_no_digit_of_the_others_baseline():
    # without response 0, b = (0 * 1 + 1 * 3) / 4 = 3/4, so A_0 = 1/4; in float32, 1e8 + 4 - 1e8 would be 0 or 8.
    # Without response 1, the first one decides: b = (1e8 + 3) / (1e8 + 3) = 1, A_1 = -1; without response 2: b = 1e8 / (1e8 + 1), A_2 = 1e-8
    norms = torch.tensor([[1e8], [1.0], [3.0]])
    made = inputs([1.0, 0.0, 1.0], [0, 0, 0], [1, 1, 1], score_norms=norms)
    found = optimal_baseline_advantages(made, leave_one_out=True).advantages[:, 0].tolist()
    assert found == pytest.approx([0.25, -1.0, 1 / (1e8 + 1)], rel=1e-6)


def test_optimal_baseline_over_the_batch_needs_no_group():
    # one response a prompt; g^2 (1, 1, 2), rewards (1, 0, 1): b = 3/4, and without each itself (2/3, 1, 1/2)
    made = inputs(
        [1.0, 0.0, 1.0], [0, 1, 2], [1, 1, 1], score_norms=torch.tensor([[1.0], [1.0], [2.0]])
    )
    found = optimal_baseline_advantages(made, scope="batch").advantages[:, 0].tolist()
    assert found == pytest.approx([1 / 4, -3 / 4, 1 / 4])
    found = optimal_baseline_advantages(made, scope="batch", leave_one_out=True).advantages[:, 0]
    assert found.tolist() == pytest.approx([1 / 3, -1.0, 1 / 2])


@pytest.mark.parametrize("name", ["optimal_baseline", "optimal_token_baseline"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_score_norms_that_are_not_finite_are_refused(name: str, value: float):
    """They would have made the plain mean of it, silently."""
    norms = torch.tensor([[1.0, value], [1.0, 3.0]])
    with pytest.raises(
        ValueError, match=rf"'{name}' needs score_norms, of which 1 of 4 are not finite"
    ):
        run_estimator(name, inputs([1.0, 0.0], [0, 0], score_norms=norms), {})
    outside = inputs([1.0, 0.0], [0, 0], [1, 2], score_norms=norms)  # where there is no token
    assert run_estimator(name, outside, {}).advantages.isfinite().all()


def test_optimal_baseline_minimises_the_variance_it_is_named_after():
    """Sum of g^2 (r - b)^2 over the group rises on both sides of b."""
    rewards, norms = torch.rand(16, dtype=torch.float64), torch.rand(16, 1, dtype=torch.float64)
    made = AdvantageInputs(
        rewards=rewards,
        response_mask=torch.ones(16, 1, dtype=torch.bool),
        group_ids=torch.zeros(16).long(),
        score_norms=norms,
    )
    baseline = rewards - optimal_baseline_advantages(made).advantages[:, 0]
    energy = [
        float((norms[:, 0] * (rewards - baseline - step) ** 2).sum()) for step in (-1e-3, 0.0, 1e-3)
    ]
    assert energy[1] < min(energy[0], energy[2])


def test_opo_golden():
    # lengths 1 and 3, rewards 1 and 0: b = 1/4
    assert opo_advantages(inputs([1.0, 0.0], [0, 0], [1, 3])).advantages[:, 0].tolist() == [
        0.75,
        -0.25,
    ]


def test_optimal_token_baseline_golden():
    # W = ((1, 2), (1, 4)); b = (1/2, 2/6); advantages ((1/2, 2/3), (-1/2, -1/3))
    out = optimal_token_baseline_advantages(
        inputs([1.0, 0.0], [0, 0], score_norms=torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
    )
    assert out.advantages.flatten().tolist() == pytest.approx([1 / 2, 2 / 3, -1 / 2, -1 / 3])


def test_optimal_token_baseline_without_the_response_itself():
    # three responses, W = (1, 2, 1), rewards (1, 0, 1): without each itself b = (1/3, 1, 1/3)
    norms = torch.tensor([[1.0], [2.0], [1.0]])
    made = inputs([1.0, 0.0, 1.0], [0, 0, 0], [1, 1, 1], score_norms=norms)
    found = optimal_token_baseline_advantages(made, leave_one_out=True).advantages[:, 0].tolist()
    assert found == pytest.approx([2 / 3, -1.0, 2 / 3])


def test_optimal_token_baseline_on_the_tail_of_the_longest_response():
    # lengths 3, 1, 2; rewards 1, 0, 1; norms 1 but for the second response's 3. W of the others where the first is alone: 3 (all it
    # had) and 2, so b = (0 * 3 + 1 * 2) / 5 = 2/5. Before: W (1, 3, 1), b = 2/5; W (2, -, 2), b = 1, which is A = 0 among equal ones
    norms = torch.ones(3, 3)
    norms[1] = 3.0
    made = inputs([1.0, 0.0, 1.0], [0, 0, 0], [3, 1, 2], score_norms=norms)
    found = optimal_token_baseline_advantages(made).advantages
    assert found[0].tolist() == pytest.approx([3 / 5, 0.0, 3 / 5])
    assert found[1].tolist() == pytest.approx([-2 / 5, 0.0, 0.0])


def test_no_token_is_without_an_advantage_because_it_is_alone():
    """On ragged responses of different rewards; the group of one keeps 0."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 40, (33,), generator=generator).tolist()
    rewards = torch.rand(33, generator=generator).tolist()
    norms = torch.rand(33, max(lengths), generator=generator)
    made = inputs(rewards, [i // 4 for i in range(33)], lengths, score_norms=norms)
    for leave_one_out in (False, True):
        found = optimal_token_baseline_advantages(made, leave_one_out=leave_one_out).advantages
        assert (found[:32][made.response_mask[:32]] != 0).all()
        assert (found[32] == 0).all()


def test_process_rewards_after_the_others_end():
    # alone at t = 1: its return is 1 + 0.5, that of the other is its outcome, 0
    made = inputs(
        [1.0, 0.0],
        [0, 0],
        [2, 1],
        score_norms=torch.ones(2, 2),
        token_rewards=torch.tensor([[0.0, 0.5], [0.25, 0.0]]),
    )
    found = optimal_token_baseline_advantages(made).advantages
    # at t = 0 returns 1.5 and 0.25, b = 0.875
    assert found.tolist() == [[0.625, 1.5], [-0.625, 0.0]]


def test_gpg_golden():
    # groups (1, 0) and (1, 1): B = 4, M = 2, alpha = 2
    out = gpg_advantages(inputs([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]))
    assert out.advantages[:, 0].tolist() == [1.0, -1.0, 0.0, 0.0]
    assert out.diagnostics == {"alpha": 2.0}
    # every group has a gradient: alpha = 1; none has: 0
    out = gpg_advantages(inputs([1.0, 0.0, 0.0, 3.0], [0, 0, 1, 1]))
    assert out.advantages[:, 0].tolist() == [0.5, -0.5, -1.5, 1.5]
    out = gpg_advantages(inputs([1.0, 1.0, 0.0], [0, 0, 1]))
    assert (out.advantages == 0).all()
    assert out.diagnostics == {"alpha": 1.0}


def test_gpg_is_the_mean_over_the_responses_that_have_a_gradient():
    """Averaging alpha A over the batch is averaging A over the B - M others, for any share of groups of equal rewards."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (40,), generator=generator).float().tolist()
    groups = [i // 4 for i in range(40)]
    made = inputs(rewards, groups)
    plain = grpo_advantages(made, divide_by_std=False).advantages[:, 0]
    mixed = torch.tensor(
        [len({rewards[j] for j in range(40) if groups[j] == groups[i]}) > 1 for i in range(40)]
    )
    assert 0 < mixed.sum() < 40
    scores = torch.rand(40, generator=generator)
    found = (gpg_advantages(made).advantages[:, 0] * scores).mean()
    assert float(found) == pytest.approx(float((plain * scores)[mixed].mean()), rel=1e-5)


def test_remax_golden():
    made = inputs([1.0, 0.0], [0, 0], greedy_rewards=torch.tensor([0.25, 0.25]))
    assert remax_advantages(made).advantages[:, 0].tolist() == [0.75, -0.25]


def test_reinforce_plus_plus_golden():
    # four tokens with returns 1, 1, 0, 0: mean 1/2, std 1/2
    out = reinforce_plus_plus_advantages(inputs([1.0, 0.0], [0, 1]), eps=0.0)
    assert out.advantages.tolist() == [[1.0, 1.0], [-1.0, -1.0]]
    # group means 1 and 5 taken off: 1, -1, 1, -1 over all tokens, std 1
    out = reinforce_plus_plus_advantages(
        inputs([2.0, 0.0, 6.0, 4.0], [0, 0, 1, 1]), group_baseline=True, eps=0.0
    )
    assert out.advantages[:, 0].tolist() == [1.0, -1.0, 1.0, -1.0]


def test_grpo_process_golden():
    # steps at every token, rewards ((0, 1), (0, 0)): mean 1/4, variance (3 * 1/16 + 9/16) / 4 = 3/16, std sqrt(3)/4
    root = 3**0.5
    ends = torch.ones(2, 2, dtype=torch.bool)
    made = inputs(
        [0.0, 0.0], [0, 0], token_rewards=torch.tensor([[0.0, 1.0], [0.0, 0.0]]), step_ends=ends
    )
    out = grpo_process_advantages(made, eps=0.0)
    assert out.advantages.flatten().tolist() == pytest.approx(
        [2 / root, 3 / root, -2 / root, -1 / root]
    )


def test_the_last_step_of_grpo_process_ends_at_the_last_token():
    # one step a response, given at its first token, and a token after it: rewards (1, 0), mean 1/2, std 1/2. A second end at the last token
    # would have made it (1, 0, 0, 0): mean 1/4
    ends = torch.tensor([[True, False], [True, False]])
    process = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    made = inputs([0.0, 0.0], [0, 0], token_rewards=process, step_ends=ends)
    out = grpo_process_advantages(made, eps=0.0)
    assert out.advantages.tolist() == [[1.0, 1.0], [-1.0, -1.0]]


def test_the_outcome_belongs_to_the_last_step_of_grpo_process():
    # steps end at tokens 0 and 1 of three: rewards (0.5, 0.5 + 1) and (0.5, 0.5 + 0): mean 3/4, deviations (-1/4, 3/4), (-1/4, -1/4),
    # variance (1 + 9 + 1 + 1) / 16 / 4 = 3/16
    ends = torch.tensor([[True, True, False]] * 2)
    made = inputs(
        [1.0, 0.0], [0, 0], [3, 3], token_rewards=torch.where(ends, 0.5, 0.0), step_ends=ends
    )
    std = (3 / 16) ** 0.5
    expected = [[0.5 / std, 0.75 / std, 0.75 / std], [-0.5 / std, -0.25 / std, -0.25 / std]]
    for step_ends in (ends, None):
        of = dataclasses.replace(made, step_ends=step_ends)
        found = grpo_process_advantages(of, eps=0.0).advantages
        torch.testing.assert_close(found, torch.tensor(expected))


def test_grpo_process_without_process_rewards_is_grpo():
    made = inputs([1.0, 0.0, 0.5, 2.0], [0, 0, 0, 1], [3, 1, 2, 2])
    assert torch.allclose(
        grpo_process_advantages(made).advantages, grpo_advantages(made).advantages, atol=1e-6
    )


def test_token_kl_grpo_golden():
    # beta 1, H 2, K ((0.2, 0.4), (0, 0)), rewards 1, 1: r = ((1 - 0.6/2, 1 - 0.4/2), (1, 1)) = ((0.7, 0.8), (1, 1)); two values: A = -1, 1
    made = inputs(
        [1.0, 1.0],
        [0, 0],
        old_logprobs=torch.tensor([[0.2, 0.4], [0.0, 0.0]]),
        ref_logprobs=torch.zeros(2, 2),
        kl_coefficient=1.0,
    )
    out = token_kl_grpo_advantages(made, eps=0.0)
    assert out.advantages.flatten().tolist() == pytest.approx([-1.0, -1.0, 1.0, 1.0])


def test_token_kl_statistics_are_of_the_responses_still_alive():
    # rewards 1, 0, 0, lengths 2, 2, 1, no KL: at t = 0 mean 1/3; at t = 1 mean 1/2, std 1/2
    zeros = torch.zeros(3, 2)
    out = token_kl_grpo_advantages(
        inputs([1.0, 0.0, 0.0], [0] * 3, [2, 2, 1], old_logprobs=zeros, ref_logprobs=zeros), eps=0.0
    )
    std = (2 / 9) ** 0.5
    assert out.advantages[0].tolist() == pytest.approx([2 / 3 / std, 1.0])
    assert out.advantages[2].tolist() == pytest.approx([-1 / 3 / std, 0.0])


def test_token_kl_has_one_length_for_all_responses():
    # K = 1 a token, beta 1, H 4: lengths 2 and 1 pay (2/4, 1/4) and 1/4, whatever their own length
    mask = torch.tensor([[True, True], [True, False]])
    returns = token_kl_returns(
        torch.tensor([1.0, 0.0]), mask.float(), torch.zeros(2, 2), mask, 1.0, horizon=4
    )
    assert returns.tolist() == [[0.5, 0.75], [-0.25, 0.0]]
    with pytest.raises(ValueError, match="max_tokens: 0 must be at least 1"):
        token_kl_grpo_advantages(inputs([1.0], [0]), max_tokens=0)


@pytest.mark.parametrize(
    ("rewards", "ref", "eps"),
    [
        ([1.0, 0.0], -math.inf, 1e-6),  # a word that the reference rules out
        ([1.0, 0.0], -1e30, 1e-6),  # squares leave the range of float32
        ([1e30, 0.0], -1.0, 1e-6),
        ([1e-30, 0.0], -1.0, 0.0),  # squares vanish: 0 / 0
    ],
)
def test_token_kl_advantages_are_finite_at_the_ends_of_the_range(
    rewards: list[float], ref: float, eps: float
):
    """Two responses, so A = (1, -1) or (-1, 1) whatever the sizes."""
    made = inputs(
        rewards,
        [0, 0],
        [1, 1],
        old_logprobs=torch.full((2, 1), -1.0),
        ref_logprobs=torch.tensor([[ref], [-1.0]]),
        kl_coefficient=1.0,
    )
    out = token_kl_grpo_advantages(made, eps=eps).advantages
    expected = [-1.0, 1.0] if ref < -1 else [1.0, -1.0]
    assert out.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_token_kl_returns_are_gae_without_a_critic():
    """r_j equals GAE(1, 1), V = 0, on the rewards -(beta / H) K_k plus the outcome at the last token, before any normalisation."""
    made, beta = full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED, dtype=torch.float64), 0.7
    assert made.old_logprobs is not None
    assert made.ref_logprobs is not None
    returns = token_kl_returns(made.rewards, made.old_logprobs, made.ref_logprobs, RAGGED, beta)
    costs = -beta / int(RAGGED.sum(1).max()) * (made.old_logprobs - made.ref_logprobs)
    gae = gae_advantages(
        AdvantageInputs(
            rewards=made.rewards,
            response_mask=RAGGED,
            group_ids=made.group_ids,
            token_rewards=costs,
        )
    )
    assert torch.allclose(gae.advantages, returns, atol=1e-12)


def test_gae_golden():
    # rewards (0, 1), values 1/2: delta (0 + 1/2 - 1/2, 1 - 1/2) = (0, 1/2); lam 1/2: A = (1/4, 1/2), returns (3/4, 1)
    out = gae_advantages(inputs([1.0], [0], values=torch.tensor([[0.5, 0.5]])), lam=0.5)
    assert out.returns is not None
    assert out.advantages.tolist() == [[0.25, 0.5]]
    assert out.returns.tolist() == [[0.75, 1.0]]


def test_gae_bootstraps_truncated_responses():
    # the value of the last token stands in for what follows: delta_1 = 1 + 1/2 - 1/2
    made = inputs(
        [1.0, 1.0], [0, 0], values=torch.full((2, 2), 0.5), truncated=torch.tensor([True, False])
    )
    assert gae_advantages(made).advantages.tolist() == [[1.0, 1.0], [0.5, 0.5]]


def test_gae_skips_tool_tokens():
    """A hole takes no discount and carries no value: the advantages are those of the response without it."""
    mask = torch.tensor([[True, False, True, True]])
    values = torch.tensor([[0.3, 9.0, 0.1, 0.6]])
    holed = gae_advantages(
        AdvantageInputs(
            rewards=torch.ones(1),
            response_mask=mask,
            group_ids=torch.zeros(1).long(),
            values=values,
        ),
        gamma=0.9,
        lam=0.8,
    )
    plain = gae_advantages(inputs([1.0], [0], [3], values=values[:, [0, 2, 3]]), gamma=0.9, lam=0.8)
    assert torch.allclose(holed.advantages[:, [0, 2, 3]], plain.advantages)


def test_gae_against_a_plain_loop():
    """A_t = sum_{k >= t} (gamma lam)^(k - t) delta_k, written as a double sum."""
    rewards, values = torch.rand(3, 6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    mask, gamma, lam = torch.ones(3, 6, dtype=torch.bool), 0.95, 0.7
    made = AdvantageInputs(
        rewards=torch.zeros(3, dtype=torch.float64),
        response_mask=mask,
        group_ids=torch.arange(3),
        token_rewards=rewards,
        values=values,
    )
    fast = gae_advantages(made, gamma=gamma, lam=lam).advantages
    for i in range(3):
        deltas = [
            float(rewards[i, k] + gamma * (values[i, k + 1] if k < 5 else 0.0) - values[i, k])
            for k in range(6)
        ]
        slow = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 6)) for t in range(6)]
        assert fast[i].tolist() == pytest.approx(slow)


def test_whitened_advantages_have_mean_zero_and_deviation_one():
    made = full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED, dtype=torch.float64)
    inside = gae_advantages(made, whiten=True).advantages[RAGGED]
    assert float(inside.mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(inside.std(correction=0)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    "name",
    ["opo", "optimal_token_baseline", "grpo_process", "token_kl_grpo", "reinforce_plus_plus"],
)
def test_against_slow_loops(name: str):
    """Each estimator written again, one response and position at a time."""
    generator = torch.Generator().manual_seed(4)
    groups = torch.randint(0, 5, (24,), generator=generator)
    mask = torch.rand(24, 6, generator=generator) < 0.7
    made = full_inputs(
        torch.rand(24, generator=generator).tolist(),
        groups.tolist(),
        mask,
        dtype=torch.float64,
        seed=2,
    )
    made = dataclasses.replace(
        made, token_rewards=made.token_rewards if name == "grpo_process" else None
    )
    assert torch.allclose(
        get_advantage_estimator(name)(made).advantages, SLOW[name](made), atol=1e-8
    )


def _peers(made: AdvantageInputs, i: int) -> list[int]:
    return [j for j in range(len(made.rewards)) if made.group_ids[j] == made.group_ids[i]]


def _slowly(
    value: Callable[[AdvantageInputs, int, int], float],
) -> Callable[[AdvantageInputs], Tensor]:
    def estimator(made: AdvantageInputs) -> Tensor:
        out = torch.zeros(made.response_mask.shape, dtype=torch.float64)
        for i, t in made.response_mask.nonzero().tolist():
            out[i, t] = value(made, i, t)
        return out

    return estimator


def _slow_opo(made: AdvantageInputs, i: int, t: int) -> float:
    lengths = {j: int(made.response_mask[j].sum()) for j in _peers(made, i)}
    return float(made.rewards[i]) - sum(lengths[j] * float(made.rewards[j]) for j in lengths) / sum(
        lengths.values()
    )


def _slow_token_baseline(made: AdvantageInputs, i: int, t: int) -> float:
    assert made.score_norms is not None
    peers = _peers(made, i)
    alive = [j for j in peers if made.response_mask[j, t]]
    if len(peers) == 1:
        return 0.0
    if len(alive) == 1:
        alive = [j for j in peers if j != i]
    energy = {
        j: float((made.score_norms[j, : t + 1] * made.response_mask[j, : t + 1]).sum())
        for j in alive
    }
    if sum(energy.values()) == 0:
        energy = dict.fromkeys(alive, 1.0)
    return float(made.rewards[i]) - sum(energy[j] * float(made.rewards[j]) for j in alive) / sum(
        energy.values()
    )


def _slow_process(made: AdvantageInputs, i: int, t: int) -> float:
    process = made.token_rewards
    assert process is not None

    def steps(j: int) -> dict[int, float]:
        places = made.response_mask[j].nonzero()[:, 0].tolist()
        outcome = float(made.rewards[j])
        return {s: float(process[j, s]) + (outcome if s == places[-1] else 0.0) for s in places}

    everything = [value for j in _peers(made, i) for value in steps(j).values()]
    mean = sum(everything) / len(everything)
    std = (sum((value - mean) ** 2 for value in everything) / len(everything)) ** 0.5
    return sum((value - mean) / (std + 1e-6) for s, value in steps(i).items() if s >= t)


def _slow_token_kl(made: AdvantageInputs, i: int, t: int) -> float:
    assert made.old_logprobs is not None
    assert made.ref_logprobs is not None

    longest = int(made.response_mask.sum(1).max())

    def to_go(j: int) -> float:
        places = [s for s in made.response_mask[j].nonzero()[:, 0].tolist() if s >= t]
        cost = sum(float(made.old_logprobs[j, s] - made.ref_logprobs[j, s]) for s in places)  # pyright: ignore[reportOptionalSubscript]
        return float(made.rewards[j]) - made.kl_coefficient / longest * cost

    alive = [to_go(j) for j in _peers(made, i) if made.response_mask[j, t]]
    mean = sum(alive) / len(alive)
    std = (sum((value - mean) ** 2 for value in alive) / len(alive)) ** 0.5
    return 0.0 if len(alive) == 1 else (to_go(i) - mean) / (std + 1e-6)


def _slow_plus_plus(made: AdvantageInputs, i: int, t: int) -> float:
    tokens = [float(made.rewards[j]) for j, _ in made.response_mask.nonzero().tolist()]
    mean = sum(tokens) / len(tokens)
    std = (sum((value - mean) ** 2 for value in tokens) / len(tokens)) ** 0.5
    return (float(made.rewards[i]) - mean) / (std + 1e-8)


SLOW = {
    "opo": _slowly(_slow_opo),
    "optimal_token_baseline": _slowly(_slow_token_baseline),
    "grpo_process": _slowly(_slow_process),
    "token_kl_grpo": _slowly(_slow_token_kl),
    "reinforce_plus_plus": _slowly(_slow_plus_plus),
}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("grpo", {"std_ddof": 2}, r"std_ddof: 2 is neither"),
        ("gae", {"lam": 1.5}, r"lam: 1.5 is outside \[0, 1\]"),
        ("reinforce_baseline", {"baseline": "median"}, r"unknown 'median'. Choose from batch_mean"),
        ("reinforce_baseline", {"decay": 1.0}, r"decay: 1.0 is outside"),
        ("optimal_baseline", {"scope": "world"}, r"unknown 'world'. Choose from group"),
    ],
)
def test_wrong_values_are_refused(name: str, parameters: dict, message: str):
    with pytest.raises(ValueError, match=message):
        get_advantage_estimator(name)(
            full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED), **parameters
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


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"rewards must have shape \[2\]"):
        inputs([1.0], [0, 0], [1, 1])
    with pytest.raises(ValueError, match="old_logprobs must have the shape"):
        inputs([1.0], [0], old_logprobs=torch.zeros(1, 9))


def test_unknown_name_offers_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"algorithm\.advantage\.name: unknown advantage estimator 'gpro'\. Did you mean grpo",
    ):
        get_advantage_estimator("gpro")
