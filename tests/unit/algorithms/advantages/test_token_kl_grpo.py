"""Golden numbers and traps of GRPO that carries the KL token by token."""

from __future__ import annotations

import math

import pytest
import torch

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    gae_advantages,
    token_kl_grpo_advantages,
)
from rlsys.algorithms.advantages.token_kl_grpo import token_kl_returns
from tests.support.advantage_examples import (
    RAGGED,
    RAGGED_GROUPS,
    RAGGED_REWARDS,
    full_inputs,
    inputs,
)


def test_token_kl_grpo_golden():
    # beta 1, H 2, K ((0.2, 0.4), (0, 0)), rewards 1, 1: r = ((1 - 0.6/2, 1 - 0.4/2), (1, 1)) =
    # ((0.7, 0.8), (1, 1)); two values: A = -1, 1
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
    """r_j equals GAE(1, 1) with V = 0, before any normalisation.

    The rewards are -(beta / H) K_k plus the outcome at the last token.
    """
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
