"""GDPO: golden numbers, a slow twin, failed reward functions and refusals."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    check_advantage_estimator,
    gdpo_advantages,
    grpo_advantages,
    run_estimator,
)
from tests.support.advantage_examples import inputs

NAN = float("nan")


def of(
    components: list[list[float]], groups: list[int], weights: list[float] | None = None
) -> AdvantageInputs:
    made = inputs([0.0] * len(groups), groups)
    return dataclasses.replace(
        made,
        reward_components=torch.tensor(components, dtype=torch.float64),
        reward_weights=None if weights is None else torch.tensor(weights, dtype=torch.float64),
    )


def test_golden():
    # A_1 = (1, -1), A_2 = (-1, 1); 2 A_1 + A_2 = (1, -1), std over the batch 1
    out = gdpo_advantages(of([[1.0, 0.0], [0.0, 1.0]], [0, 0], [2.0, 1.0]), eps=0.0)
    assert out.advantages[:, 0].tolist() == [1.0, -1.0]
    # the paper's point: rewards (0, 1), (0, 2), (1, 1), (1, 2): sums 1, 2, 2, 3 tie for GRPO;
    # A_1 = (-1, -1, 1, 1), A_2 = (-1, 1, -1, 1), S = (-2, 0, 0, 2), std sqrt(2); with weights
    # (1, 3): S = (-4, 2, -2, 4), std sqrt(10)
    rows = [[0.0, 1.0], [0.0, 2.0], [1.0, 1.0], [1.0, 2.0]]
    out = gdpo_advantages(of(rows, [0] * 4), eps=0.0)
    assert out.advantages[:, 0].tolist() == pytest.approx([-math.sqrt(2), 0, 0, math.sqrt(2)])
    out = gdpo_advantages(of(rows, [0] * 4, [1.0, 3.0]), eps=0.0)
    assert out.advantages[:, 0].tolist() == pytest.approx(
        [value / math.sqrt(10) for value in (-4, 2, -2, 4)]
    )


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_slow_loop_with_failures(ddof: int):
    generator = torch.Generator().manual_seed(ddof)
    table = torch.rand(24, 3, generator=generator, dtype=torch.float64)
    table[::7, 1] = NAN
    table[4:8, 2] = NAN  # a whole group
    groups = [i // 4 for i in range(24)]
    weights = [1.0, -0.5, 2.0]
    made = of(table.tolist(), groups, weights)
    found = gdpo_advantages(made, std_ddof=ddof, eps=1e-3).advantages[:, 0]

    sums = []
    for i in range(24):
        total = 0.0
        for k in range(3):
            peers = [float(table[j, k]) for j in range(24) if groups[j] == groups[i]]
            peers = [value for value in peers if not math.isnan(value)]
            if math.isnan(float(table[i, k])) or len(peers) < 2:
                continue
            std = statistics.pstdev(peers) if ddof == 0 else statistics.stdev(peers)
            total += weights[k] * (float(table[i, k]) - statistics.fmean(peers)) / (std + 1e-3)
        sums.append(total)
    spread = statistics.pstdev(sums) if ddof == 0 else statistics.stdev(sums)
    assert statistics.fmean(sums) == pytest.approx(0.0, abs=1e-12)  # so it is not subtracted
    assert found.tolist() == pytest.approx([value / (spread + 1e-3) for value in sums])


def test_one_function_is_grpo_divided_by_the_deviation_of_the_batch():
    rewards, groups = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0, 0, 0, 1, 1, 1]
    plain = grpo_advantages(inputs(rewards, groups)).advantages[:, 0].double()
    found = gdpo_advantages(of([[value] for value in rewards], groups)).advantages[:, 0]
    torch.testing.assert_close(found, plain / plain.std(correction=0), atol=1e-5, rtol=1e-5)


def test_equal_rewards_and_groups_of_one_get_exactly_zero():
    made = of([[0.1, 0.2], [0.1, 0.2], [0.1, 0.2], [0.7, 0.3]], [0, 0, 0, 1])
    assert (gdpo_advantages(made).advantages == 0).all()
    # one function differs, the other is equal: the equal one adds exactly nothing
    one = gdpo_advantages(of([[1.0], [0.0], [0.0]], [0] * 3)).advantages
    both = gdpo_advantages(of([[1.0, 0.1], [0.0, 0.1], [0.0, 0.1]], [0] * 3)).advantages
    assert torch.equal(one, both)


def test_refusals():
    with pytest.raises(ValueError, match=r"'gdpo' needs reward_components, .* each function"):
        run_estimator("gdpo", inputs([1.0], [0]), {})
    made = of([[1.0], [0.0]], [0, 0])
    with pytest.raises(ValueError, match="token_rewards: 'gdpo' is defined for outcome rewards"):
        run_estimator("gdpo", dataclasses.replace(made, token_rewards=torch.zeros(2, 2)), {})
    with pytest.raises(
        ValueError, match=r"reward_components must have shape \[2, K\], not \(1, 1\)"
    ):
        dataclasses.replace(made, reward_components=torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"reward_weights must have shape \[1\], .* not \(3,\)"):
        dataclasses.replace(made, reward_weights=torch.ones(3))
    with pytest.raises(ValueError, match="std_ddof: 2 is neither"):
        check_advantage_estimator("gdpo", {"std_ddof": 2})
