"""Golden numbers and traps of GAE."""

from __future__ import annotations

import pytest
import torch

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    gae_advantages,
)
from tests.support.advantage_examples import (
    RAGGED,
    RAGGED_GROUPS,
    RAGGED_REWARDS,
    full_inputs,
    inputs,
)


def test_gae_golden():
    # rewards (0, 1), values 1/2: delta (0 + 1/2 - 1/2, 1 - 1/2) = (0, 1/2);
    # lam 1/2: A = (1/4, 1/2), returns (3/4, 1)
    out = gae_advantages(inputs([1.0], [0], values=torch.tensor([[0.5, 0.5]])), lam=0.5)
    assert out.returns is not None
    assert out.advantages.tolist() == [[0.25, 0.5]]
    assert out.returns.tolist() == [[0.75, 1.0]]


def test_gae_bootstraps_truncated_responses_on_request():
    # the value of the last token stands in for what follows: delta_1 = 1 + 1/2 - 1/2
    made = inputs(
        [1.0, 1.0], [0, 0], values=torch.full((2, 2), 0.5), truncated=torch.tensor([True, False])
    )
    bootstrapped = gae_advantages(made, bootstrap_truncated=True)
    assert bootstrapped.advantages.tolist() == [[1.0, 1.0], [0.5, 0.5]]
    assert gae_advantages(made).advantages.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_the_target_of_a_truncated_response_is_its_reward():
    """So that a critic has a fixed point, which with the bootstrap only outcomes of 0 have."""
    made = inputs([1.0], [0], values=torch.tensor([[0.0, 7.0]]), truncated=torch.tensor([True]))
    plain, bootstrapped = gae_advantages(made), gae_advantages(made, bootstrap_truncated=True)
    assert plain.returns is not None
    assert bootstrapped.returns is not None
    assert plain.returns.tolist() == [[1.0, 1.0]]
    assert bootstrapped.returns.tolist() == [[8.0, 8.0]]


def test_gae_skips_tool_tokens():
    """A token outside the mask takes no discount: the advantages are those without the token."""
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
