"""A batch as groups padded to one size: what every regression of hierarchical baselines reads."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlsys.algorithms.advantages.grouping import Groups, others_mean
from rlsys.algorithms.advantages.hierarchical.horizons import Horizons

TINY = 1e-100  # no denominator is 0, and no sum of what there is feels it


@dataclass(frozen=True)
class GroupedBatch:
    """A batch as K groups padded to G responses; absent responses have `present` False, ratio, reward and weight 0."""

    ratios: Tensor  # [K, G, T] float64 rho_{<=t}
    rewards: Tensor  # [K, G] float64
    centre: Tensor  # [K, G] what the reward is compared with before the horizons are fitted
    present: Tensor  # [K, G] bool
    # [K, G, T] float64 weight of a response in the regression of position t; 0 where it has no token
    weights: Tensor
    mass: Tensor  # [K, G, 2] sum of a response's score norms and their number: a ridge counts in their mean
    horizons: Horizons

    @property
    def final(self) -> Tensor:
        """[K, G] ratio of the whole response."""
        return self.ratios[:, :, -1]

    @property
    def base(self) -> Tensor:
        """[K, G] policy-gradient weight before any horizon: rho_{<=L} (R - centre)."""
        return self.final * (self.rewards - self.centre)

    def groups(self, which: Tensor) -> GroupedBatch:
        """Return those groups alone."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen = {name: array[which] for name, array in arrays.items() if isinstance(array, Tensor)}
        return replace(self, **chosen)


@dataclass(frozen=True)
class Places:
    """Which response stands at each place of groups padded to the largest."""

    index: Tensor  # [K, G] int64; where no response stands, some response is named
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
        """[B, ...] -> [K, G, ...], 0 (False) where no response stands."""
        shape = (*self.present.shape, *[1] * (values.ndim - 1))
        return torch.where(self.present.reshape(shape), values[self.index], values.new_zeros(()))

    def gather(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """[K, G, ...] -> [B, ...] in the order of the batch."""
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
    """Return the batch in groups, centred on the mean of the other responses.

    Shapes: ratios [B, T] and rewards [B] of the responses; norms and alive [K, G, T] at their places.

    Conventions: the regressions are of the weight W_t instead of Delta_t, so their weights are those of
    Delta_t over rho_{<=t}^2: the squared norm of the score. At one position it is large for a few
    responses only, hence its mean with the average norm of the response.
    """
    rewards = rewards[places.index]
    rewards = rewards - rewards[:, :1]  # changes nothing but rounding: equal ones are now exactly 0
    rewards = torch.where(places.present, rewards, 0.0)

    mass = torch.stack([norms.sum(dim=2), alive.sum(dim=2).double()], dim=-1)
    smoothed = (norms + mass[..., :1] / mass[..., 1:].clamp(min=1)) / 2
    return GroupedBatch(
        ratios=places.spread(ratios),
        rewards=rewards,
        centre=others_mean(rewards, places.present),
        present=places.present,
        weights=torch.where(alive, smoothed, 0.0),
        mass=mass,
        horizons=horizons,
    )


def others_variance(rewards: Tensor, present: Tensor) -> Tensor:
    """Return [K, G] the variance of the rewards of the others of the group; exactly 0 where they are all equal."""
    others = (present.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    # Centred first, so that nothing cancels.
    centred = torch.where(present, rewards - rewards.sum(dim=1, keepdim=True) / (others + 1), 0.0)
    squares = (centred.square().sum(dim=1, keepdim=True) - centred.square()) / others
    variance = squares - (centred / others).square()
    return torch.where(variance > 1e-12 * squares, variance, 0.0)
