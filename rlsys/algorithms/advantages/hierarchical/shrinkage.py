"""How far hierarchical baselines leave the leave-one-out mean: strengths read from responses that they are not used on.

The strength of a fit is a number in [0, 1] that multiplies what it adds to the leave-one-out mean. It starts from what pays on average for
the size of the group, and leaves that only for a strength that saved clearly more on held-out groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical.group_regression import (
    TINY,
    GroupedBatch,
    by_cholesky,
    group_corrections,
)
from rlsys.algorithms.advantages.hierarchical.pooled_regression import (
    fold_of_group,
    held_out_predictions,
)

# The five numbers below were set on random tabular policies and prompts other than those of docs/hierarchical_baselines.md.
HALF_STRENGTH = 16.0  # responses a group with which its own fit starts at strength 1/2
CAUTION = 1.0  # standard errors by which a gain must exceed that of the starting strength
SMALL_SAMPLE = 24.0  # the standard error of n groups is itself unsure: it is widened by 1 + 24 / n
CERTAINTY = 4.0  # standard errors that the correlation of reward and log-weight must exceed before it moves the centre
LEANING = 8.0  # others, after the first three, by which the centre has gone half of its way to their mean weighted by v
STEPS = 9  # candidates: 0, 1/8, ... 1
SAMPLED_POSITIONS = 64  # a strength is one number for all positions: these many, evenly spread, are enough to read it


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


def cautious_strengths(gains: Gains, start: Tensor) -> Tensor:
    """[m] the strengths whose gain over `start` [m] is largest after CAUTION standard errors over groups are taken off; `start` if none is positive.

    Source: the one-standard-error rule of Breiman et al. 1984, Classification and Regression Trees, section 3.4.3.
    """
    groups, m = gains.linear.shape
    if groups < 2:
        return start
    steps = torch.linspace(0, 1, STEPS, dtype=torch.float64, device=start.device)
    candidates = torch.cat(
        [start[None], torch.cartesian_prod(*[steps] * m).reshape(-1, m)]
    )  # [c, m]
    gain = 2 * gains.linear @ candidates.T - torch.einsum(
        "kmn,cm,cn->kc", gains.quadratic, candidates, candidates
    )
    gain = gain - gain[:, :1]
    error = gain.std(dim=0) / groups**0.5 * (1 + SMALL_SAMPLE / groups)
    return candidates[(gain.mean(dim=0) - CAUTION * error).argmax()]


def tilted_centre(batch: GroupedBatch) -> Tensor:
    """[K, G] mean reward of the others, moved towards the best single baseline: a little always, and all the way where it is sure.

        l_i = c_i + m_i / (m_i + LEANING) (sum_j v_j R_j / sum_j v_j - c_i),   v_j = rho_j^(1/4) sum_t n_jt,   m_i = (n - 3)_+
        l_i + (1 - CERTAINTY^2 / z_i^2)_+ (sum_j w_j R_j / sum_j w_j - l_i),   w_j = rho_j^2 sum_t n_jt,       z_i = m_i^(1/2) atanh(r_i)

    over the n others j of the group, rho their ratio of the whole response and r_i the correlation of log w and R among them.

    Source: the mean weighted by w minimises sum_j w_j (R_j - b)^2, the second moment without what positions have in common; z is about standard
    normal without a correlation (Fisher 1921, On the "probable error" of a coefficient of correlation); the positive part is that of James and Stein.

    Conventions: the mean by w rests on the few largest weights and cannot say how sure it is, while the correlation with the logarithm rests
    on all responses. The mean by v lies between the plain one and that by w, and is hardly noisier than the plain one. Without score norms in the
    weights of the regression, there are none in v and w. Groups of at most 4 keep the mean, and so does a response whose others have equal weights
    or equal rewards. Sums over the others are formed without their total, so that not even rounding knows the response.
    """
    size = batch.rewards.shape[1]
    both = batch.present[:, :, None] & batch.present[:, None, :]
    others = (
        both & ~torch.eye(size, dtype=torch.bool, device=batch.rewards.device)
    ).double()  # [K, i, j]
    number = others.sum(dim=2)

    def over_others(values: Tensor) -> Tensor:
        return (others @ values[..., None])[..., 0]

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        count = number.clamp(min=1)
        return over_others(a * b) / count - over_others(a) * over_others(b) / count.square()

    def mean_by(weights: Tensor) -> Tensor:
        total = over_others(weights)
        return torch.where(
            total > 0, over_others(weights * rewards) / total.clamp(min=TINY), batch.centre
        )

    rewards = batch.rewards
    norms = batch.present.double() if batch.mass is None else batch.mass[..., 0]
    weight = batch.final.square() * norms
    logs = torch.where(batch.present, weight.clamp(min=TINY).log(), 0.0)
    spread = (covariance(logs, logs) * covariance(rewards, rewards)).clamp(min=0).sqrt()
    correlation = (covariance(logs, rewards) / spread.clamp(min=TINY)).clamp(-1 + 1e-12, 1 - 1e-12)
    degrees = (number - 3).clamp(min=0)
    certain = (1 - CERTAINTY**2 / (degrees * correlation.atanh().square()).clamp(min=TINY)).clamp(
        min=0
    )
    lean = batch.centre + degrees / (degrees + LEANING) * (
        mean_by(batch.final**0.25 * norms) - batch.centre
    )
    return lean + certain * (mean_by(weight) - lean)


def starting_strength(size: Tensor) -> Tensor:
    """G / (G + HALF_STRENGTH) for groups of G responses.

    Not of fewer effective ones where ratios spread: a group whose strength sinks with its own large ratios sinks it just where there is most to save.
    """
    return size / (size + HALF_STRENGTH)


def sampled(batch: GroupedBatch) -> Tensor:
    """At most SAMPLED_POSITIONS positions, evenly over what the layers span, as far as there are responses."""
    span = batch.layers.span
    number = min(SAMPLED_POSITIONS, span)
    positions = torch.arange(number, device=batch.ratios.device) * span // number
    return positions[positions < batch.ratios.shape[2]]


def fold_strengths(
    batch: GroupedBatch, n: Tensor, ridge: float, *, pooled: bool, own: bool
) -> Tensor:
    """[F, 2] strengths of the pooled fit and of the groups' own for the groups of each fold, from the other folds alone.

    For fold f, every other fold g is predicted by a pooled fit that saw neither f nor g, and by its groups' own leave-one-out fits.
    """
    positions = sampled(batch)
    fold = fold_of_group(len(batch.rewards), n.device)
    number = int(fold.max()) + 1
    pooled = pooled and number > 2  # of two folds, no fit has seen neither
    within = (
        group_corrections(batch, positions, ridge)
        if own
        else torch.zeros_like(batch.ratios[:, :, positions])
    )
    shared = (
        held_out_predictions(batch, positions, ridge, by_cholesky)
        if pooled
        else within.new_zeros(number, *within.shape)
    )
    sizes = batch.present.sum(dim=1).double()
    in_use = torch.tensor(
        [pooled, own], dtype=torch.float64, device=n.device
    )  # what is not has equal gains at every strength
    strengths = torch.zeros(number, 2, dtype=torch.float64, device=n.device)
    for f in range(number):
        seen = fold != f
        gains = Gains.of(
            n[seen][:, :, positions], batch.base[seen], torch.stack([shared[f], within], -1)[seen]
        )
        start = starting_strength(sizes[seen].mean())
        strengths[f] = (
            cautious_strengths(gains, torch.stack([torch.zeros_like(start), start])) * in_use
        )
    return strengths
