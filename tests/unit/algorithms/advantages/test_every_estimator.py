"""Properties of every estimator, and slow reference implementations of five of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    available_advantage_estimators,
    compares_group,
    get_advantage_estimator,
    optimal_token_baseline_advantages,
    run_estimator,
)
from tests.support.advantage_examples import (
    MASK,
    RAGGED,
    RAGGED_GROUPS,
    RAGGED_REWARDS,
    TOKEN_ARRAYS,
    accepted_by,
    full_inputs,
    inputs,
    padded,
    reordered,
)


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_zero_outside_the_mask_and_padding_changes_nothing(name: str):
    narrow = accepted_by(name, full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED))
    estimator = get_advantage_estimator(name)
    a, b = estimator(narrow).advantages, estimator(padded(narrow, 3)).advantages
    assert a.isfinite().all()
    assert (a[~RAGGED] == 0).all()
    assert torch.allclose(a, b[:, :4], atol=1e-6)
    assert (b[:, 4:] == 0).all()


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_the_order_of_responses_does_not_matter(name: str):
    made = accepted_by(name, full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED))
    order = torch.tensor([4, 2, 0, 3, 1])
    estimator = get_advantage_estimator(name)
    assert torch.allclose(
        estimator(reordered(made, order)).advantages,
        estimator(made).advantages[order],
        atol=1e-6,
    )


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_bfloat16_is_computed_in_float32_and_float64_stays(name: str):
    estimator = get_advantage_estimator(name)
    half = full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED, dtype=torch.bfloat16)
    half = accepted_by(name, half)
    arrays = {
        field: getattr(half, field).float()
        for field in (*TOKEN_ARRAYS, "rewards", "greedy_rewards", "reward_components")
        if getattr(half, field) is not None
    }
    out = estimator(half).advantages
    assert out.dtype == torch.float32
    assert torch.equal(out, estimator(dataclasses.replace(half, **arrays)).advantages)
    double = full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED, dtype=torch.float64)
    double = accepted_by(name, double)
    assert estimator(double).advantages.dtype == torch.float64


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_equal_rewards_and_groups_of_one_get_exactly_zero_where_groups_are_compared(name: str):
    # 0.1 * 3 / 3 != 0.1 in floating point: the mean of equal rewards is not that reward
    norms = torch.tensor([[0.3, 0.1], [0.7, 0.2], [0.9, 0.4], [0.2, 0.2]])
    zeros = torch.zeros(4, 2)
    made = inputs(
        [0.1, 0.1, 0.1, 0.7],
        [0, 0, 0, 1],
        squared_score_norms=norms,
        rollout_logprobs=norms * 0.9,
        old_logprobs=norms,
        ref_logprobs=norms,
        values=zeros,
        greedy_rewards=zeros[:, 0],
        reward_components=torch.tensor([[0.1, 0.2]] * 3 + [[0.7, 0.3]]),
        problem_ids=["a", "a", "a", "b"],
    )
    assert bool((get_advantage_estimator(name)(made).advantages == 0).all()) == compares_group(name)


def test_no_token_is_without_an_advantage_because_it_is_alone():
    """On ragged responses of different rewards; the group of one keeps 0."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 40, (33,), generator=generator).tolist()
    rewards = torch.rand(33, generator=generator).tolist()
    norms = torch.rand(33, max(lengths), generator=generator)
    made = inputs(rewards, [i // 4 for i in range(33)], lengths, squared_score_norms=norms)
    for leave_one_out in (False, True):
        found = optimal_token_baseline_advantages(made, leave_one_out=leave_one_out).advantages
        assert (found[:32][made.response_mask[:32]] != 0).all()
        assert (found[32] == 0).all()


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
    assert made.squared_score_norms is not None
    peers = _peers(made, i)
    alive = [j for j in peers if made.response_mask[j, t]]
    if len(peers) == 1:
        return 0.0
    if len(alive) == 1:
        alive = [j for j in peers if j != i]
    energy = {
        j: float((made.squared_score_norms[j, : t + 1] * made.response_mask[j, : t + 1]).sum())
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

    differences = made.old_logprobs - made.ref_logprobs
    longest = int(made.response_mask.sum(1).max())

    def to_go(j: int) -> float:
        places = [s for s in made.response_mask[j].nonzero()[:, 0].tolist() if s >= t]
        cost = sum(float(differences[j, s]) for s in places)
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


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_the_estimators_of_the_library_pass(name: str):
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    inputs = AdvantageInputs(
        rewards=torch.tensor([1.0, 0.0]),
        response_mask=MASK,
        group_ids=torch.tensor([0, 0]),
        rollout_logprobs=noise,
        old_logprobs=noise + 0.1,
        ref_logprobs=noise,
        squared_score_norms=noise.abs(),
        greedy_rewards=torch.zeros(2),
        reward_components=torch.tensor([[1.0, 0.5], [0.0, 0.0]]),
        problem_ids=["a", "a"],
        kl_coefficient=0.1,
    )
    output = run_estimator(name, inputs, {})
    assert (output.advantages[~MASK] == 0).all()
