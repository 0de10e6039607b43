"""Statistics over the responses of a group, for groups of any size in any order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which group each of B responses belongs to: `index[i]` in 0..K-1, and `counts[k]` members of each."""

    index: Tensor  # [B] int64
    counts: Tensor  # [K] int64

    @staticmethod
    def of(group_ids: Tensor) -> Groups:
        """From arbitrary group ids."""
        _, index, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
        return Groups(index, counts)

    def total(self, values: Tensor) -> Tensor:
        """[B, ...] -> [K, ...] sum over each group."""
        return values.new_zeros((len(self.counts), *values.shape[1:])).index_add_(
            0, self.index, values
        )

    def others_total(self, values: Tensor) -> Tensor:
        """[B, ...] -> [B, ...] float64 sum over the other members of the response's group.

        Formed from the members before and after it, not as the total less its own value: a large value of its own takes no digit of the sum.
        """
        order = torch.argsort(self.index, stable=True)
        starts = self.counts.cumsum(0) - self.counts
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=order.device) - starts[self.index[order]]
        table = values.new_zeros(
            (len(self.counts), int(self.counts.max()) + 2, *values.shape[1:]), dtype=torch.float64
        )
        table[self.index, slots + 1] = values.double()
        before, after = table.cumsum(1), table.flip(1).cumsum(1).flip(1)
        return before[self.index, slots] + after[self.index, slots + 2]

    def extreme(self, values: Tensor, which: str) -> Tensor:
        """[B, ...] -> [K, ...] smallest ("amin") or largest ("amax") value of each group."""
        start = values.new_zeros((len(self.counts), *values.shape[1:]))
        index = self.index.reshape(-1, *[1] * (values.ndim - 1)).expand_as(values)
        return start.scatter_reduce_(0, index, values, reduce=which, include_self=False)

    def spread(self, group_values: Tensor) -> Tensor:
        """[K, ...] -> [B, ...] each group's value at its members."""
        return group_values[self.index]

    def all_equal(self, values: Tensor) -> Tensor:
        """[B] bool: every member of the response's group has the same value (so also: it is alone)."""
        return self.spread(self.extreme(values, "amax") == self.extreme(values, "amin"))


def others_mean(rewards: Tensor, present: Tensor) -> Tensor:
    """Return [K, G] the mean reward of the others of the group; its own reward for a response that is alone, so that it gets exactly 0.

    For groups padded to one size; `present` [K, G] says where there is a response, and rewards are 0
    elsewhere.
    """
    others = present.sum(dim=1, keepdim=True) - 1
    mean = (rewards.sum(dim=1, keepdim=True) - rewards) / others.clamp(min=1)
    # Whatever rounding does to the mean of equal numbers.
    equal = ((rewards == rewards[:, :1]) | ~present).all(dim=1, keepdim=True)
    return torch.where(equal | (others < 1), rewards, mean)


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or in float64 where they are that already."""
    return values if values.dtype == torch.float64 else values.float()


def broadcast_to_tokens(response_values: Tensor, response_mask: Tensor) -> Tensor:
    """[B] -> [B, T]: the response's value at each of its tokens, 0 outside the mask."""
    return torch.where(response_mask, response_values[:, None], 0.0)


def outcome_rewards(rewards: Tensor, token_rewards: Tensor | None, response_mask: Tensor) -> Tensor:
    """[B] total reward of a response: its outcome plus all process rewards."""
    rewards = at_least_float32(rewards)
    if token_rewards is None:
        return rewards
    return rewards + torch.where(response_mask, at_least_float32(token_rewards), 0.0).sum(dim=1)
