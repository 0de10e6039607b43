"""How far hierarchical baselines leave the leave-one-out mean: shrinkage read from responses that they are not used on.

The shrinkage of a fit is a number in [0, 1] that multiplies what it adds to the leave-one-out mean. It starts from what pays on average for
the size of the group, and leaves that only for a shrinkage that saved clearly more on held-out groups.
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
AUTOMATIC_RIDGE = 2.0  # responses; the rest of the shrinkage is the shrinkage
HALF_SHRINKAGE = 16.0  # responses of a group with which its own fit starts at shrinkage 1/2
CAUTION = 1.0  # standard errors by which a gain must exceed that of the starting shrinkage
SMALL_SAMPLE = 24.0  # the standard error of n groups is itself unsure: it is widened by 1 + 24 / n
# Standard errors that the correlation of reward and log-weight must exceed to move the centre.
CERTAINTY = 4.0
# Others, after the first three, by which the centre has gone half of its way to their mean by v.
LEANING = 8.0
STEPS = 9  # candidates: 0, 1/8, ... 1
# A shrinkage is one number for all positions: these many, evenly spread, are enough to read it.
SAMPLED_POSITIONS = 64


@dataclass(frozen=True)
class Gains:
    """What corrections f would have saved on groups that the fits had not seen.

    With y the weight under the centre, sum n y^2 - sum n (y - gamma . f)^2 = 2 gamma . u - gamma V gamma.
    """

    linear: Tensor  # [K, m] u = sum n y f
    quadratic: Tensor  # [K, m, m] V = sum n f f^T

    @staticmethod
    def of(n: Tensor, target: Tensor, corrections: Tensor) -> Gains:
        """From weights n [K, G, t], targets y [K, G] and corrections f [K, G, t, m]."""
        weighted = corrections * n[..., None]
        return Gains(
            torch.einsum("kgtm,kg->km", weighted, target),
            torch.einsum("kgtm,kgtn->kmn", weighted, corrections),
        )


def cautious_shrinkage(gains: Gains, start: Tensor) -> Tensor:
    """[m] the shrinkage whose gain over `start` [m] is largest after CAUTION standard errors over groups are taken off; `start` if none is positive.

    Source: the one-standard-error rule of Breiman et al. 1984, Classification and Regression Trees, section 3.4.3.
    """
    groups, m = gains.linear.shape
    if groups < 2:
        return start
    steps = torch.linspace(0, 1, STEPS, dtype=torch.float64, device=start.device)
    grid = torch.cartesian_prod(*[steps] * m).reshape(-1, m)
    candidates = torch.cat([start[None], grid])  # [c, m]
    quadratic = torch.einsum("kmn,cm,cn->kc", gains.quadratic, candidates, candidates)
    gain = 2 * gains.linear @ candidates.T - quadratic
    gain = gain - gain[:, :1]
    error = gain.std(dim=0) / groups**0.5 * (1 + SMALL_SAMPLE / groups)
    return candidates[(gain.mean(dim=0) - CAUTION * error).argmax()]


def weighted_baseline(batch: GroupedBatch) -> Tensor:
    """Return [K, G] the mean reward of the others, moved towards the best single baseline: a little always, and all the way where it is sure.

        l_i = c_i + m_i / (m_i + LEANING) (sum_j v_j R_j / sum_j v_j - c_i),   v_j = rho_j^(1/4) sum_t n_jt,   m_i = (n - 3)_+
        l_i + (1 - CERTAINTY^2 / z_i^2)_+ (sum_j w_j R_j / sum_j w_j - l_i),   w_j = rho_j^2 sum_t n_jt,       z_i = m_i^(1/2) atanh(r_i)

    over the n others j of the group, rho their ratio of the whole response and r_i the correlation of
    log w and R among them.

    Source: the mean weighted by w minimises sum_j w_j (R_j - b)^2, the second moment without what
    positions have in common; z is about standard normal without a correlation (Fisher 1921, On the
    "probable error" of a coefficient of correlation); the positive part is that of James and Stein.

    Conventions: the mean by w rests on the few largest weights and cannot say how sure it is, while the
    correlation with the logarithm rests on all responses. The mean by v lies between the plain one and
    that by w, and is hardly noisier than the plain one. Groups of at most 4 keep the mean, and so does a
    response whose others have equal weights or equal rewards.
    """
    others = _Others.of(batch)
    norms = batch.mass[..., 0]
    weight = batch.final.square() * norms

    degrees = (others.number - 3).clamp(min=0)
    logs = torch.where(batch.present, weight.clamp(min=TINY).log(), 0.0)
    z_squared = degrees * others.correlation(logs).atanh().square()
    certain = (1 - CERTAINTY**2 / z_squared.clamp(min=TINY)).clamp(min=0)

    light = others.mean_by(batch.final**0.25 * norms)
    lean = batch.centre + degrees / (degrees + LEANING) * (light - batch.centre)
    return lean + certain * (others.mean_by(weight) - lean)


@dataclass(frozen=True)
class _Others:
    """Statistics over the other responses of each response's group.

    Sums are formed without their total, so that not even rounding knows the response.
    """

    batch: GroupedBatch
    members: Tensor  # [K, i, j] float64, 1 where j is another response of the group of i
    number: Tensor  # [K, G]

    @staticmethod
    def of(batch: GroupedBatch) -> _Others:
        both = batch.present[:, :, None] & batch.present[:, None, :]
        itself = torch.eye(both.shape[1], dtype=torch.bool, device=both.device)
        members = (both & ~itself).double()
        return _Others(batch, members, members.sum(dim=2))

    def total(self, values: Tensor) -> Tensor:
        """[K, G] -> [K, G] sum over the others."""
        return (self.members @ values[..., None])[..., 0]

    def mean_by(self, weights: Tensor) -> Tensor:
        """Return [K, G] the mean reward of the others by those weights; the centre where they have none."""
        total = self.total(weights)
        mean = self.total(weights * self.batch.rewards) / total.clamp(min=TINY)
        return torch.where(total > 0, mean, self.batch.centre)

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return [K, G] the covariance among the others."""
        count = self.number.clamp(min=1)
        return self.total(a * b) / count - self.total(a) * self.total(b) / count.square()

    def correlation(self, values: Tensor) -> Tensor:
        """Return [K, G] the correlation with the rewards among the others, short of -1 and 1."""
        rewards = self.batch.rewards
        product = self.covariance(values, values) * self.covariance(rewards, rewards)
        spread = product.clamp(min=0).sqrt().clamp(min=TINY)
        return (self.covariance(values, rewards) / spread).clamp(-1 + 1e-12, 1 - 1e-12)


def starting_shrinkage(size: Tensor) -> Tensor:
    """G / (G + HALF_SHRINKAGE) for groups of G responses.

    Not of fewer effective ones where ratios spread: a group whose shrinkage sinks with its own large ratios sinks it just where there is most to save.
    """
    return size / (size + HALF_SHRINKAGE)


def sampled(batch: GroupedBatch) -> Tensor:
    """At most SAMPLED_POSITIONS positions, evenly over what the horizons span, as far as there are responses."""
    span = batch.horizons.span
    number = min(SAMPLED_POSITIONS, span)
    positions = torch.arange(number, device=batch.ratios.device) * span // number
    return positions[positions < batch.ratios.shape[2]]


def fold_shrinkage(
    batch: GroupedBatch, n: Tensor, ridge: float, *, pooled: bool, own: bool
) -> Tensor:
    """Return [F, 2] shrinkage of the pooled fit and of the groups' own for the groups of each fold, from the other folds alone.

    For fold f, every other fold g is predicted by a pooled fit that saw neither f nor g, and by its
    groups' own leave-one-out fits.
    """
    positions = sampled(batch)
    fold = fold_of_group(len(batch.rewards), n.device)
    number = int(fold.max()) + 1
    pooled = pooled and number > 2  # of two folds, no fit has seen neither

    within = torch.zeros_like(batch.ratios[:, :, positions])
    if own:
        within = group_corrections(batch, positions, ridge)
    shared = within.new_zeros(number, *within.shape)
    if pooled:
        shared = held_out_predictions(batch, positions, ridge)

    sizes = batch.present.sum(dim=1).double()
    # What is not in use has equal gains at every shrinkage, so rounding would choose.
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
    """What the horizons add to the centre, and how strongly."""

    correction: Tensor  # [K, G, t]
    shrinkage: Mapping[str, float] = field(default_factory=dict)


def fit_with_ridge(batch: GroupedBatch, scope: str, ridge: float) -> Fitted:
    """Return the corrections at shrinkage 1 with one ridge for all; `auto` is `group` then."""
    positions = torch.arange(batch.ratios.shape[2], device=batch.ratios.device)
    fit = pooled_corrections if scope == "batch" else group_corrections
    return Fitted(fit(batch, positions, ridge))


def fit_automatically(batch: GroupedBatch, n: Tensor, scope: str, positions: Tensor) -> Fitted:
    """Return the corrections of both scopes, each at the shrinkage that responses it is not used on allow."""
    own, pooled = _strengths(batch, n, scope)
    correction = torch.zeros_like(batch.ratios[:, :, positions])
    if (own > 0).any():
        correction = own[..., None] * group_corrections(batch, positions, AUTOMATIC_RIDGE)
    if (pooled > 0).any():
        correction += pooled_corrections(batch, positions, AUTOMATIC_RIDGE, pooled)
    return Fitted(
        correction,
        {"shrinkage_group": float(own.mean()), "shrinkage_batch": float(pooled.mean())},
    )


def _strengths(batch: GroupedBatch, n: Tensor, scope: str) -> tuple[Tensor, Tensor]:
    """Return [K, 1] of each group's own fit, and [F] of the pooled fit for each fold."""
    groups = len(batch.rewards)
    if groups == 1:
        own = starting_shrinkage(batch.present.sum(dim=1, keepdim=True).double())
        own = own * (scope != "batch")
        return own, own.new_zeros(1)
    both = fold_shrinkage(batch, n, AUTOMATIC_RIDGE, pooled=scope != "group", own=scope != "batch")
    return both[fold_of_group(groups, n.device), 1][:, None], both[:, 0]
