"""BNPO: golden numbers, a slow twin with SciPy-free densities, and its two special cases."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

from rlsys.algorithms.advantages import bnpo_advantages, check_advantage_estimator, run_estimator
from tests.support.advantage_examples import inputs

# Three groups of four with 1, 2 and 3 right responses.
RIGHT = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
GROUPS = [0] * 4 + [1] * 4 + [2] * 4


def density(p: float, alpha: float, beta: float) -> float:
    norm = math.gamma(alpha + beta) / (math.gamma(alpha) * math.gamma(beta))
    return norm * p ** (alpha - 1) * (1 - p) ** (beta - 1)


def test_golden():
    # p 1/4, 1/2, 3/4: m 1/2, v 1/16 (ddof 1), m (1 - m) / v - 1 = 3, a = b = 3/2,
    # alpha = beta = 1 + 1/2 = 3/2: Beta(p; 3/2, 3/2) = 8/pi sqrt(p (1 - p))
    out = bnpo_advantages(inputs(RIGHT, GROUPS))
    assert out.diagnostics == {"alpha": pytest.approx(1.5), "beta": pytest.approx(1.5)}
    low = 8 / math.pi * math.sqrt(3 / 16)
    middle = 8 / math.pi / 2
    assert out.advantages[:, 0].tolist() == pytest.approx(
        [
            0.75 / low,
            *([-0.25 / low] * 3),
            *([0.5 / middle] * 2),
            *([-0.5 / middle] * 2),
            *([0.25 / low] * 3),
            -0.75 / low,
        ]
    )


def test_a_slow_loop():
    generator = torch.Generator().manual_seed(1)
    rewards = (torch.rand(40, generator=generator) < 0.3).double()
    groups = [i // 5 for i in range(40)]
    lengths = torch.randint(1, 4, (40,), generator=generator).tolist()
    made = dataclasses.replace(inputs([0.0] * 40, groups, lengths), rewards=rewards)
    found = bnpo_advantages(made)

    means = [statistics.fmean(rewards[5 * g : 5 * g + 5].tolist()) for g in range(8)]
    m, v = statistics.fmean(means), statistics.variance(means)
    a, b = (m * (1 - m) / v - 1) * m, (m * (1 - m) / v - 1) * (1 - m)
    alpha, beta = max(1.0, 1 + a / 3), max(1.0, 1 + b / 3)
    assert alpha != beta
    for i in range(40):
        p = means[i // 5]
        wanted = 0.0 if p in (0.0, 1.0) else (float(rewards[i]) - p) / density(p, alpha, beta)
        assert float(found.advantages[i, 0]) == pytest.approx(wanted, rel=1e-9)
    assert (found.advantages[~made.response_mask] == 0).all()


def test_without_a_spread_of_the_means_nothing_is_normalised():
    """A single group, equal means, and means of 0 and 1 alone, where a and b are negative."""
    out = bnpo_advantages(inputs([1.0, 0.0, 0.0, 0.0], [0] * 4))
    assert out.advantages[:, 0].tolist() == [0.75, -0.25, -0.25, -0.25]
    out = bnpo_advantages(inputs([1.0, 0.0, 0.0, 1.0], [0, 0, 1, 1]))
    assert out.advantages[:, 0].tolist() == [0.5, -0.5, -0.5, 0.5]
    # m 1/3, v 1/3: m (1 - m) / v - 1 = -1/3 < 0
    out = bnpo_advantages(inputs([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0, 0, 1, 1, 2, 2]))
    assert out.diagnostics == {"alpha": 1.0, "beta": 1.0}
    assert (out.advantages == 0).all()


def test_a_range_is_mapped_to_zero_and_one():
    plain = bnpo_advantages(inputs(RIGHT, GROUPS)).advantages
    mapped = inputs([2 * value - 1 for value in RIGHT], GROUPS)
    torch.testing.assert_close(bnpo_advantages(mapped, lowest=-1.0).advantages, plain)


def test_a_group_of_one_gets_zero_and_does_not_count():
    plain = bnpo_advantages(inputs(RIGHT, GROUPS))
    more = bnpo_advantages(inputs([*RIGHT, 1.0], [*GROUPS, 3]))
    assert more.diagnostics == plain.diagnostics
    assert torch.equal(more.advantages[:12], plain.advantages)
    assert (more.advantages[12] == 0).all()


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"'bnpo' takes rewards in \[0, 1\], and a response has 2"):
        run_estimator("bnpo", inputs([2.0, 0.0], [0, 0]), {})
    with pytest.raises(ValueError, match=r"^algorithm.*parameters\.lowest: 1 is not below highest"):
        check_advantage_estimator("bnpo", {"lowest": 1.0})
    made = inputs([1.0, 0.0], [0, 0], token_rewards=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="token_rewards: 'bnpo' is defined for outcome rewards"):
        run_estimator("bnpo", made, {})
