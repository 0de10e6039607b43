"""Batches for tests of advantage estimators."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs


def inputs(
    rewards: list[float], groups: list[int], lengths: list[int] | None = None, **more: Any
) -> AdvantageInputs:
    """Return inputs with these rewards; responses have two tokens unless `lengths` is given."""
    lengths = lengths or [2] * len(rewards)
    columns = torch.arange(max(max(lengths), 1))
    mask = columns[None, :] < torch.tensor(lengths)[:, None]

    return AdvantageInputs(
        rewards=torch.tensor(rewards), response_mask=mask, group_ids=torch.tensor(groups), **more
    )


def full_inputs(
    rewards: list[float],
    groups: list[int],
    mask: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdvantageInputs:
    """Return inputs with noise in every optional array.

    The noise reaches outside the mask, where an estimator must not look.
    """
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
        squared_score_norms=noise().abs(),
        greedy_rewards=torch.ones(len(rewards), dtype=dtype) / 4,
        truncated=torch.arange(len(rewards)) % 2 == 0,
        reward_components=torch.rand(len(rewards), 2, generator=generator).to(dtype),
        reward_weights=torch.tensor([1.0, 2.0]),
        problem_ids=[f"problem {group}" for group in groups],
        kl_coefficient=0.5,
    )


# Estimators that refuse process rewards.
OUTCOME_ONLY = ("bnpo", "gdpo", "maxrl")


def accepted_by(name: str, batch: AdvantageInputs) -> AdvantageInputs:
    """Return the batch without the process rewards, where the estimator `name` refuses them."""
    return dataclasses.replace(batch, token_rewards=None) if name in OUTCOME_ONLY else batch


def reordered(batch: AdvantageInputs, order: Tensor) -> AdvantageInputs:
    """Return the batch with its responses in another order."""
    arrays = {
        name: getattr(batch, name)[order]
        for name in (*TOKEN_ARRAYS, *RESPONSE_ARRAYS)
        if getattr(batch, name) is not None
    }
    assert batch.problem_ids is not None
    problem_ids = [batch.problem_ids[row] for row in order.tolist()]
    return dataclasses.replace(batch, problem_ids=problem_ids, **arrays)


def padded(batch: AdvantageInputs, columns: int) -> AdvantageInputs:
    """Return the same batch with more columns, masked out and full of large numbers."""

    def wider(values: Tensor | None, fill: float) -> Tensor | None:
        if values is None:
            return None
        extra = torch.full((len(values), columns), fill)
        return torch.cat([values, extra.to(values.dtype)], dim=1)

    arrays = {name: wider(getattr(batch, name), 1e4) for name in TOKEN_ARRAYS}
    mask = wider(batch.response_mask, 0.0)
    assert mask is not None
    return dataclasses.replace(batch, response_mask=mask, **arrays)


TOKEN_ARRAYS = (
    "token_rewards",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "squared_score_norms",
)

# A full response, one with a hole, one of a single token, an empty one, and one alone in its group.
RAGGED = torch.tensor(
    [
        [True, True, True, True],
        [True, False, True, False],
        [True, False, False, False],
        [False] * 4,
        [True, True, False, False],
    ]
)
RAGGED_REWARDS = [1.0, 0.0, 0.5, 0.25, 1.0]
RAGGED_GROUPS = [3, 3, 3, 3, 9]

RESPONSE_ARRAYS = (
    *("rewards", "response_mask", "group_ids", "greedy_rewards", "truncated"),
    "reward_components",
)

MASK = torch.tensor([[True, True, True], [True, False, False]])


def made() -> AdvantageInputs:
    """Return two responses of one group, of three tokens and of one."""
    return AdvantageInputs(
        rewards=torch.tensor([1.0, 0.0]), response_mask=MASK, group_ids=torch.tensor([0, 0])
    )
