"""The regressions behind hierarchical baselines: within a group without the response itself, and over groups without its own.

Written for the policy-gradient weight rho_{<=L} R - sum_s rho_{<=s} beta_t^(s) instead of the residual Delta_t, which is that weight
over rho_{<=t}: the same regression with the ratio moved into the weights, without a division, and with features that do not depend on t.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical_layers import Layers

CHUNK = 1 << 21  # numbers in the largest temporary array: 16 MiB in float64, of which a handful live at once


@dataclass(frozen=True)
class GroupedBatch:
    """A batch as K groups padded to G responses; absent responses have `present` False and weight 0."""

    ratios: Tensor  # [K, G, T] float64 rho_{<=t}
    rewards: Tensor  # [K, G] float64
    present: Tensor  # [K, G] bool
    weights: Tensor  # [K, G, T] float64 weight of a response in the regression of position t; 0 where it has no token there
    layers: Layers

    @property
    def final(self) -> Tensor:
        """[K, G] ratio of the whole response."""
        return self.ratios[:, :, -1]

    @property
    def others_mean(self) -> Tensor:
        """[K, G] mean reward of the others of the group; 0 for a response that is alone."""
        others = self.present.sum(dim=1, keepdim=True) - 1
        return (self.rewards.sum(dim=1, keepdim=True) - self.rewards) / others.clamp(min=1)

    @property
    def others_variance(self) -> Tensor:
        """[K, G] variance of the rewards of the others of the group (divided by their number)."""
        others = (self.present.sum(dim=1, keepdim=True) - 1).clamp(min=1)
        centred = torch.where(self.present, self.rewards - _row_mean(self.rewards, self.present), 0.0)  # first centred: no cancellation
        squares = (centred.square().sum(dim=1, keepdim=True) - centred.square()) / others
        return (squares - (centred / others).square()).clamp(min=0)

    @property
    def base(self) -> Tensor:
        """[K, G] policy-gradient weight under the leave-one-out mean: rho_{<=L} (R - mean of the others)."""
        return self.final * (self.rewards - self.others_mean)

    def groups(self, which: Tensor) -> GroupedBatch:
        """Those groups alone."""
        return GroupedBatch(self.ratios[which], self.rewards[which], self.present[which], self.weights[which], self.layers)


def _row_mean(values: Tensor, present: Tensor) -> Tensor:
    return torch.where(present, values, 0.0).sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True)


def chunks(positions: Tensor, numbers_per_position: int) -> Iterator[Tensor]:
    """`positions` in runs whose temporaries stay within CHUNK numbers."""
    yield from positions.split(max(1, CHUNK // max(numbers_per_position, 1)))


def group_corrections(batch: GroupedBatch, positions: Tensor, ridge: float) -> Tensor:
    """[K, G, t] what the layers fitted within the group add to the leave-one-out mean baseline, for each response without itself.

        f_i(t) = sum_s rho_{<=s, i} beta_{t, -i}^(s)
        beta_{t, -i} = argmin  sum_{j != i} n_j(t) (rho_j (R_j - c_{-i}) - x_j(t) . beta)^2 + ridge |beta|^2,   x: `Layers.features`

    with c_{-i} the mean of the others. Not fitted G times: the residual of a left-out response is e_i / (1 - h_ii), and since the target is
    linear in c, that of the fit centred without i is the same combination of two such residuals.

    Source: references/hierarchical_token_baselines.md, section 7; the leave-one-out residual: Allen 1974, The relationship between variable
    selection and data augmentation.

    Conventions: `ridge` counts responses with all ratios 1. A response without a token at t has weight 0 there and gets 0, as does one
    whose group has no other with a token.
    """
    fit = _by_features if batch.layers.most < batch.rewards.shape[1] else _by_products
    groups, size = batch.rewards.shape
    width = groups * size * (min(size, batch.layers.most) + 2)
    return torch.cat([fit(batch, part, ridge) for part in chunks(positions, width)], dim=2)


def _targets(batch: GroupedBatch) -> Tensor:
    """[K, 1, G, 2] the two parts of the target, rho R and rho: rho (R - c) is the first less c times the second."""
    return torch.stack([batch.final * batch.rewards, batch.final], dim=-1)[:, None]


def _by_features(batch: GroupedBatch, positions: Tensor, ridge: float) -> Tensor:
    """With one p x p system a position, for fewer layers than responses."""
    n = batch.weights[:, :, positions].transpose(1, 2)  # [K, t, G]
    x = batch.layers.features(batch.ratios, positions)  # [K, t, G, p]
    y = _targets(batch).expand(*n.shape, 2)
    weighted = (x * n[..., None]).transpose(2, 3)
    gram = weighted @ x
    gram.diagonal(dim1=2, dim2=3).add_(ridge)
    factor = torch.linalg.cholesky(gram)
    beta = torch.cholesky_solve(weighted @ y, factor)
    leverage = (weighted * torch.cholesky_solve(x.transpose(2, 3), factor)).sum(dim=2)[..., None]  # h_ii
    without = (x @ beta - leverage * y) / (1 - leverage)
    return _centred(batch, without, n)


def _by_products(batch: GroupedBatch, positions: Tensor, ridge: float) -> Tensor:
    """With one G x G system a position, for as many layers as responses or more."""
    n = batch.weights[:, :, positions].transpose(1, 2)
    inverse, roots = inverse_kernel(batch, positions, ridge)
    y = _targets(batch) * roots[..., None]
    residual = (inverse @ y) / inverse.diagonal(dim1=2, dim2=3)[..., None]
    without = (y - residual) / roots.clamp(min=TINY)[..., None]
    return _centred(batch, without, n)


def inverse_kernel(batch: GroupedBatch, positions: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """[K, t, G, G] inverse of N^1/2 X X^T N^1/2 + ridge, which is (1 - hat matrix) / ridge, and [K, t, G] N^1/2."""
    roots = batch.weights[:, :, positions].transpose(1, 2).sqrt()
    kernel = batch.layers.kernel(batch.ratios, positions) * roots[..., :, None] * roots[..., None, :]
    kernel.diagonal(dim1=2, dim2=3).add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(kernel)), roots


TINY = 1e-100


def _centred(batch: GroupedBatch, without: Tensor, n: Tensor) -> Tensor:
    """[K, G, t] from the two parts of the left-out prediction; 0 where the response has no token."""
    fitted = without[..., 0] - batch.others_mean[:, None] * without[..., 1]
    return torch.where(n > 0, fitted, 0.0).transpose(1, 2)


@dataclass(frozen=True)
class NormalEquations:
    """Sums over responses of n x x^T and n x y at each position."""

    gram: Tensor  # [..., t, p, p]
    moment: Tensor  # [..., t, p]

    @staticmethod
    def of(batch: GroupedBatch, positions: Tensor) -> NormalEquations:
        """Of the pooled regression: features times the variance of the others' rewards, targets centred by their mean.

        The shift from the leave-one-out mean to the best baseline is a covariance of reward and ratio; it grows with the spread of the
        rewards, and where all others agree there is none to expect.
        """
        n = batch.weights[:, :, positions].movedim(2, 0).flatten(1)  # [t, K * G]
        x = pooled_features(batch, positions).transpose(0, 1).flatten(1, 2)  # [t, K * G, p]
        weighted = (x * n[..., None]).transpose(1, 2)
        return NormalEquations(weighted @ x, (weighted @ batch.base.flatten()[None, :, None])[..., 0])


def pooled_features(batch: GroupedBatch, positions: Tensor) -> Tensor:
    """[K, t, G, p] layers' features times the variance of the rewards of the others of the group."""
    return batch.layers.features(batch.ratios, positions) * batch.others_variance[:, None, :, None]
