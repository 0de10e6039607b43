"""Shrinkage coefficients of hierarchical baselines, chosen on held-out groups.

A shrinkage coefficient is a number in [0, 1] that multiplies the correction that a fit adds to the
leave-one-out baseline. It starts from a default for the size of the group. It changes only where
another coefficient reduces the second moment on held-out groups by clearly more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical.group_regression import group_corrections
from rlsys.algorithms.advantages.hierarchical.grouped_batch import TINY, GroupedBatch
from rlsys.algorithms.advantages.hierarchical.pooled_regression import (
    fold_of_group,
    held_out_predictions,
    pooled_corrections,
)

# The six numbers below were set on random tabular policies and prompts other than those of
# docs/hierarchical_baselines.md.
AUTOMATIC_RIDGE = 2.0  # in responses; shrinkage coefficients do the rest
HALF_SHRINKAGE = 16.0  # responses of a group with which its own fit starts at shrinkage 1/2
CAUTION = 1.0  # standard errors by which a gain must exceed that of the starting shrinkage
# The standard error of n groups is itself uncertain: it is widened by 1 + 24 / n.
SMALL_SAMPLE = 24.0
# Standard errors that the correlation of reward and log-weight must exceed for weights w.
CERTAINTY = 4.0
# Other responses, after the first three, with which the baseline is half the plain mean and half
# the mean by weights v.
HALF_WEIGHTED = 8.0
STEPS = 9  # candidates: 0, 1/8, ... 1
# A coefficient is one number for all positions, so this many evenly spread ones suffice to set it.
SAMPLED_POSITIONS = 64


@dataclass(frozen=True)
class Gains:
    """The reduction of the second moment by corrections f on groups that the fits had not seen.

        sum n y^2 - sum n (y - gamma . f)^2 = 2 gamma . u - gamma V gamma

    y is the policy-gradient weight under the leave-one-out baseline.
    """

    linear: Tensor  # [K, m] u = sum n y f
    quadratic: Tensor  # [K, m, m] V = sum n f f^T

    @staticmethod
    def of(n: Tensor, target: Tensor, corrections: Tensor) -> Gains:
        """Sum over weights n [K, G, t], targets y [K, G] and corrections f [K, G, t, m]."""
        weighted = corrections * n[..., None]
        linear = torch.einsum("kgtm,kg->km", weighted, target)
        quadratic = torch.einsum("kgtm,kgtn->kmn", weighted, corrections)
        return Gains(linear, quadratic)


def cautious_shrinkage(gains: Gains, start: Tensor) -> Tensor:
    """Return [m] the shrinkage with the largest lower confidence bound on its gain over `start`.

    The bound is the mean gain less CAUTION standard errors over groups. Where none is positive,
    `start` [m] stays.

    Source: the one-standard-error rule of Breiman et al. 1984, Classification and Regression Trees,
    section 3.4.3.
    """
    groups, m = gains.linear.shape
    if groups < 2:
        return start

    steps = torch.linspace(0, 1, STEPS, dtype=torch.float64, device=start.device)
    grid = torch.cartesian_prod(*[steps] * m).reshape(-1, m)
    candidates = torch.cat([start[None], grid])  # [c, m]

    quadratic = torch.einsum("kmn,cm,cn->kc", gains.quadratic, candidates, candidates)
    gain = 2 * gains.linear @ candidates.T - quadratic
    gain = gain - gain[:, :1]  # over that of `start`, the first candidate

    error = gain.std(dim=0) / groups**0.5 * (1 + SMALL_SAMPLE / groups)
    return candidates[(gain.mean(dim=0) - CAUTION * error).argmax()]


def weighted_baseline(batch: GroupedBatch) -> Tensor:
    """Return [K, G] the weighted leave-one-out baseline of each response.

        l_i = c_i + m_i / (m_i + HALF_WEIGHTED) (sum_j v_j R_j / sum_j v_j - c_i)
        b_i = l_i + (1 - CERTAINTY^2 / z_i^2)_+ (sum_j w_j R_j / sum_j w_j - l_i)

        v_j = rho_j^(1/4) sum_t n_jt,   w_j = rho_j^2 sum_t n_jt
        m_i = (n - 3)_+,                z_i = m_i^(1/2) atanh(r_i)

    c_i is the plain leave-one-out baseline. Sums are over the n other responses j of the group, rho
    is their ratio of the whole response and r_i the correlation of log w and R among them. So the
    mild weights v always count a little, and the weights w of the best single baseline only where
    the rewards clearly depend on them.

    Source: the mean weighted by w minimises sum_j w_j (R_j - b)^2, the second moment without the
    covariance of positions; z is about standard normal without a correlation (Fisher 1921, On the
    "probable error" of a coefficient of correlation); the positive part is that of James and Stein.

    Conventions: the mean by w depends on the few largest weights and gives no estimate of its own
    error, while the correlation with the logarithm depends on all responses. The mean by v lies
    between the plain one and that by w, and is hardly noisier than the plain one. Groups of at most
    4 keep the plain mean, and so does a response where the other responses have equal weights or
    equal rewards.
    """
    others = _OtherResponses.of(batch)
    norms = batch.mass[..., 0]
    weight = batch.final.square() * norms

    degrees = (others.number - 3).clamp(min=0)
    logs = torch.where(batch.present, weight.clamp(min=TINY).log(), 0.0)
    z_squared = degrees * others.correlation(logs).atanh().square()
    certain = (1 - CERTAINTY**2 / z_squared.clamp(min=TINY)).clamp(min=0)

    mild_mean = others.mean_by(batch.final**0.25 * norms)
    mild_fraction = degrees / (degrees + HALF_WEIGHTED)
    mild = batch.baseline + mild_fraction * (mild_mean - batch.baseline)
    return mild + certain * (others.mean_by(weight) - mild)


@dataclass(frozen=True)
class _OtherResponses:
    """Statistics over the other responses of each response's group.

    Each sum leaves the response out from the start instead of subtracting it from a total, so that
    the result does not depend on it even by rounding.
    """

    batch: GroupedBatch
    members: Tensor  # [K, i, j] float64, 1 where j is another response of the group of i
    number: Tensor  # [K, G]

    @staticmethod
    def of(batch: GroupedBatch) -> _OtherResponses:
        """Return the statistics of a batch."""
        both = batch.present[:, :, None] & batch.present[:, None, :]
        itself = torch.eye(both.shape[1], dtype=torch.bool, device=both.device)
        members = (both & ~itself).double()
        return _OtherResponses(batch, members, members.sum(dim=2))

    def total(self, values: Tensor) -> Tensor:
        """Sum over the other responses: [K, G] -> [K, G]."""
        return (self.members @ values[..., None])[..., 0]

    def mean_by(self, weights: Tensor) -> Tensor:
        """Return [K, G] the mean reward by those weights; the plain baseline where all are 0."""
        total = self.total(weights)
        mean = self.total(weights * self.batch.rewards) / total.clamp(min=TINY)
        return torch.where(total > 0, mean, self.batch.baseline)

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return [K, G] the covariance among the other responses."""
        count = self.number.clamp(min=1)
        return self.total(a * b) / count - self.total(a) * self.total(b) / count.square()

    def correlation(self, values: Tensor) -> Tensor:
        """Return [K, G] the correlation with the rewards, strictly between -1 and 1."""
        rewards = self.batch.rewards
        product = self.covariance(values, values) * self.covariance(rewards, rewards)
        spread = product.clamp(min=0).sqrt().clamp(min=TINY)
        return (self.covariance(values, rewards) / spread).clamp(-1 + 1e-12, 1 - 1e-12)


def starting_shrinkage(size: Tensor) -> Tensor:
    """Return G / (G + HALF_SHRINKAGE) for groups of G responses.

    G is not the effective sample size: large ratios would then lower the coefficient of a group
    just where there is most variance to reduce.
    """
    return size / (size + HALF_SHRINKAGE)


def sampled(batch: GroupedBatch) -> Tensor:
    """Return at most SAMPLED_POSITIONS positions, evenly over the span of the horizons.

    Positions behind the last column of the batch are left out.
    """
    span = batch.horizons.span
    number = min(SAMPLED_POSITIONS, span)
    positions = torch.arange(number, device=batch.ratios.device) * span // number
    return positions[positions < batch.ratios.shape[2]]


def fold_shrinkage(
    batch: GroupedBatch, n: Tensor, ridge: float, *, pooled: bool, own: bool
) -> Tensor:
    """Return [F, 2] the shrinkage of the pooled and of the within-group fit, for each fold.

    The coefficients of fold f come from the other folds alone. Every other fold g is predicted by a
    pooled fit that saw neither f nor g, and by the leave-one-out fits within its groups.
    """
    positions = sampled(batch)
    fold = fold_of_group(len(batch.rewards), n.device)
    number = int(fold.max()) + 1
    pooled = pooled and number > 2  # with two folds, every fit has seen one of them

    within = torch.zeros_like(batch.ratios[:, :, positions])
    if own:
        within = group_corrections(batch, positions, ridge)
    shared = within.new_zeros(number, *within.shape)
    if pooled:
        shared = held_out_predictions(batch, positions, ridge)

    sizes = batch.present.sum(dim=1).double()
    # A fit that is not in use has equal gains at every shrinkage, so rounding would choose.
    in_use = torch.tensor([pooled, own], dtype=torch.float64, device=n.device)
    shrinkage = torch.zeros(number, 2, dtype=torch.float64, device=n.device)
    for f in range(number):
        seen = fold != f
        corrections = torch.stack([shared[f], within], -1)[seen]
        gains = Gains.of(n[seen][:, :, positions], batch.base[seen], corrections)
        start = starting_shrinkage(sizes[seen].mean())
        start = torch.stack([torch.zeros_like(start), start])
        shrinkage[f] = cautious_shrinkage(gains, start) * in_use
    return shrinkage


@dataclass(frozen=True)
class Fitted:
    """The corrections to the leave-one-out baseline, and their shrinkage coefficients."""

    correction: Tensor  # [K, G, t]
    shrinkage: Mapping[str, float] = field(default_factory=dict)


def fit_with_ridge(batch: GroupedBatch, scope: str, ridge: float) -> Fitted:
    """Return the corrections at shrinkage 1 with one ridge for all; `auto` means `group` here."""
    positions = torch.arange(batch.ratios.shape[2], device=batch.ratios.device)
    fit = pooled_corrections if scope == "batch" else group_corrections
    return Fitted(fit(batch, positions, ridge))


def fit_automatically(batch: GroupedBatch, n: Tensor, scope: str, positions: Tensor) -> Fitted:
    """Return the corrections of both scopes, with shrinkage coefficients from held-out groups."""
    own, pooled = _shrinkage_coefficients(batch, n, scope)

    correction = torch.zeros_like(batch.ratios[:, :, positions])
    if (own > 0).any():
        correction = own[..., None] * group_corrections(batch, positions, AUTOMATIC_RIDGE)
    if (pooled > 0).any():
        correction += pooled_corrections(batch, positions, AUTOMATIC_RIDGE, pooled)

    used = {"shrinkage_group": float(own.mean()), "shrinkage_batch": float(pooled.mean())}
    return Fitted(correction, used)


def _shrinkage_coefficients(batch: GroupedBatch, n: Tensor, scope: str) -> tuple[Tensor, Tensor]:
    """Return [K, 1] of each group's own fit, and [F] of the pooled fit for each fold."""
    groups = len(batch.rewards)
    if groups == 1:  # nothing is held out: the default
        own = starting_shrinkage(batch.present.sum(dim=1, keepdim=True).double())
        own = own * (scope != "batch")
        return own, own.new_zeros(1)

    both = fold_shrinkage(batch, n, AUTOMATIC_RIDGE, pooled=scope != "group", own=scope != "batch")
    return both[fold_of_group(groups, n.device), 1][:, None], both[:, 0]
