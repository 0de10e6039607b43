"""A batch as groups padded to one size: the input of every regression of hierarchical baselines."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlsys.algorithms.advantages.grouping import Groups, others_mean
from rlsys.algorithms.advantages.hierarchical.horizons import Horizons

TINY = 1e-100  # keeps denominators above 0, and is too small to change any sum


@dataclass(frozen=True)
class GroupedBatch:
    """A batch as K groups padded to G responses.

    Absent responses have `present` False, and ratio, reward and weight 0.
    """

    ratios: Tensor  # [K, G, T] float64 rho_{<=t}
    rewards: Tensor  # [K, G] float64
    baseline: Tensor  # [K, G] leave-one-out baseline, plain or weighted
    present: Tensor  # [K, G] bool
    # [K, G, T] float64 weight of a response in the regression of position t; 0 without a token
    weights: Tensor
    # [K, G, 2] sum of a response's squared score norms and their number: their mean is the unit of
    # a ridge
    mass: Tensor
    horizons: Horizons

    @property
    def final(self) -> Tensor:
        """Return [K, G] the ratio of the whole response."""
        return self.ratios[:, :, -1]

    @property
    def base(self) -> Tensor:
        """Return [K, G] the policy-gradient weight before any horizon, rho_{<=L} (R - baseline)."""
        return self.final * (self.rewards - self.baseline)

    def groups(self, which: Tensor) -> GroupedBatch:
        """Return those groups alone."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen = {name: array[which] for name, array in arrays.items() if isinstance(array, Tensor)}
        return replace(self, **chosen)


@dataclass(frozen=True)
class Places:
    """The index of the response at each place of groups padded to the largest."""

    index: Tensor  # [K, G] int64; arbitrary where no response is present
    present: Tensor  # [K, G] bool

    @staticmethod
    def of(groups: Groups) -> Places:
        """Return the places of the groups' members, in the order in which they come."""
        order = torch.argsort(groups.index, stable=True)
        starts = groups.counts.cumsum(0) - groups.counts
        slots = torch.arange(int(groups.counts.max()), device=order.device)
        index = order[(starts[:, None] + slots).clamp(max=len(order) - 1)]
        return Places(index, slots < groups.counts[:, None])

    def spread(self, values: Tensor) -> Tensor:
        """Arrange by group: [B, ...] -> [K, G, ...], 0 (False) where no response is present."""
        shape = (*self.present.shape, *[1] * (values.ndim - 1))
        return torch.where(self.present.reshape(shape), values[self.index], values.new_zeros(()))

    def gather(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Arrange in the order of the batch: [K, G, ...] -> [B, ...]."""
        kept = values[self.present].to(dtype)
        whole = torch.empty_like(kept)
        whole[self.index[self.present]] = kept
        return whole


def group_batch(
    ratios: Tensor,
    rewards: Tensor,
    norms: Tensor,
    alive: Tensor,
    places: Places,
    horizons: Horizons,
) -> GroupedBatch:
    """Return the batch in groups, with the mean of the other responses as the baseline.

    Shapes: ratios [B, T] and rewards [B] of the responses; norms and alive [K, G, T] at their
    places.

    Conventions: the target of the regressions is W_t instead of Delta_t, so their weights are those
    of Delta_t over rho_{<=t}^2: the squared norm of the score. At one position it is large for a
    few responses only, so it is averaged with the mean squared norm of the response.
    """
    rewards = rewards[places.index]
    # A common shift does not matter to leave-one-out; it makes equal rewards exactly 0.
    rewards = rewards - rewards[:, :1]
    rewards = torch.where(places.present, rewards, 0.0)

    mass = torch.stack([norms.sum(dim=2), alive.sum(dim=2).double()], dim=-1)
    smoothed = (norms + mass[..., :1] / mass[..., 1:].clamp(min=1)) / 2
    return GroupedBatch(
        ratios=places.spread(ratios),
        rewards=rewards,
        baseline=others_mean(rewards, places.present),
        present=places.present,
        weights=torch.where(alive, smoothed, 0.0),
        mass=mass,
        horizons=horizons,
    )


def others_variance(rewards: Tensor, present: Tensor) -> Tensor:
    """Return [K, G] the variance of the rewards of the other responses.

    It is exactly 0 where they are all equal.
    """
    others = (present.sum(dim=1, keepdim=True) - 1).clamp(min=1)

    # Less the group's mean first, so that no digits cancel.
    mean = rewards.sum(dim=1, keepdim=True) / (others + 1)
    centred = torch.where(present, rewards - mean, 0.0)

    squares = (centred.square().sum(dim=1, keepdim=True) - centred.square()) / others
    variance = squares - (centred / others).square()
    return torch.where(variance > 1e-12 * squares, variance, 0.0)
