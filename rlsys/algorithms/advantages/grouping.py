"""Statistics over the responses of a group, for groups of any size in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The group of each of B responses, `index[i]` in 0..K-1, and the sizes `counts[k]`."""

    index: Tensor  # [B] int64
    counts: Tensor  # [K] int64

    @staticmethod
    def of(group_ids: Tensor) -> Groups:
        """Return the groups of arbitrary group ids."""
        _, index, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
        return Groups(index, counts)

    def total(self, values: Tensor) -> Tensor:
        """Sum over each group: [B, ...] -> [K, ...]."""
        start = values.new_zeros((len(self.counts), *values.shape[1:]))
        return start.index_add_(0, self.index, values)

    def others_total(self, values: Tensor) -> Tensor:
        """Sum over the other responses of each response's group: [B, ...] -> [B, ...] float64.

        The sum is that of the members before and after the response, not the total less its own
        value: a large value of its own does not cost the sum any digits.
        """
        order = torch.argsort(self.index, stable=True)
        starts = self.counts.cumsum(0) - self.counts
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=order.device) - starts[self.index[order]]

        # A row per group, with a column of zeros before the first member and after the last.
        shape = (len(self.counts), int(self.counts.max()) + 2, *values.shape[1:])
        table = values.new_zeros(shape, dtype=torch.float64)
        table[self.index, slots + 1] = values.double()

        before = table.cumsum(1)
        after = table.flip(1).cumsum(1).flip(1)
        return before[self.index, slots] + after[self.index, slots + 2]

    def extreme(self, values: Tensor, which: str) -> Tensor:
        """Return the smallest ("amin") or largest ("amax") value of each group: [K, ...]."""
        start = values.new_zeros((len(self.counts), *values.shape[1:]))
        index = self.index.reshape(-1, *[1] * (values.ndim - 1)).expand_as(values)
        return start.scatter_reduce_(0, index, values, reduce=which, include_self=False)

    def spread(self, group_values: Tensor) -> Tensor:
        """Return each group's value at its members: [K, ...] -> [B, ...]."""
        return group_values[self.index]

    def all_equal(self, values: Tensor) -> Tensor:
        """Return [B] whether all members of the response's group have the same value.

        A group of one has.
        """
        largest = self.extreme(values, "amax")
        smallest = self.extreme(values, "amin")
        return self.spread(largest == smallest)


def others_mean(rewards: Tensor, present: Tensor) -> Tensor:
    """Return [K, G] the leave-one-out baseline: the mean reward of the other responses.

    For groups padded to one size; `present` [K, G] says where there is a response, and rewards are
    0 elsewhere. A response that is alone, or in a group of equal rewards, has its own reward as the
    baseline, so that its advantage is exactly 0.
    """
    others = present.sum(dim=1, keepdim=True) - 1
    mean = (rewards.sum(dim=1, keepdim=True) - rewards) / others.clamp(min=1)

    # The mean of equal numbers may differ from them by rounding.
    equal = ((rewards == rewards[:, :1]) | ~present).all(dim=1, keepdim=True)
    return torch.where(equal | (others < 1), rewards, mean)


def at_least_float32(values: Tensor) -> Tensor:
    """Return `values` in float32, or in float64 where they are that already."""
    return values if values.dtype == torch.float64 else values.float()


def broadcast_to_tokens(response_values: Tensor, response_mask: Tensor) -> Tensor:
    """Return each response's value at its tokens: [B] -> [B, T], 0 outside the mask."""
    return torch.where(response_mask, response_values[:, None], 0.0)


def outcome_rewards(rewards: Tensor, token_rewards: Tensor | None, response_mask: Tensor) -> Tensor:
    """Return [B] the total reward of each response: its outcome plus all process rewards."""
    rewards = at_least_float32(rewards)
    if token_rewards is None:
        return rewards

    process = torch.where(response_mask, at_least_float32(token_rewards), 0.0)
    return rewards + process.sum(dim=1)


def leaves_one_out(parameters: Mapping[str, Any]) -> bool:
    """Return whether a baseline's parameters leave the response itself out, which is unbiased."""
    return parameters.get("leave_one_out", False)
