"""How far hierarchical baselines leave the leave-one-out mean: strengths read from responses that they are not used on.

The strength of a fit is a number in [0, 1] that multiplies what it adds to the leave-one-out mean. It starts from what pays on average for
the size of the group and the spread of its ratios, and leaves that only for a strength that saved clearly more on held-out responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical_fits import (
    TINY,
    GroupedBatch,
    by_cholesky,
    group_corrections,
    inverse_kernel,
    targets,
)
from rlsys.algorithms.advantages.hierarchical_pooling import fold_of_group, held_out_predictions

# The five numbers below were set on random tabular policies other than those of docs/hierarchical_baselines.md.
HALF_STRENGTH = 14.0  # effective responses a group with which its own fit starts at strength 1/2
CAUTION = 2.0  # standard errors by which a gain must exceed that of the starting strength
SMALL_SAMPLE = 6.0  # the standard error of n units is itself unsure: it is widened by 1 + 6 / n
CERTAINTY = 4.0  # standard errors that the correlation of reward and log-ratio must exceed before it moves the centre
STEPS = 9  # candidates: 0, 1/8, ... 1
SAMPLED_POSITIONS = 64  # a strength is one number for all positions: these many, evenly spread, are enough to read it


@dataclass(frozen=True)
class Gains:
    """What corrections f would have saved on units (responses) that the fits had not seen.

    With y the weight under the centre, sum n y^2 - sum n (y - gamma . f)^2 = 2 gamma . u - gamma V gamma.
    """

    linear: Tensor  # [..., units, m] u = sum n y f
    quadratic: Tensor  # [..., units, m, m] V = sum n f f^T

    @staticmethod
    def of(n: Tensor, target: Tensor, corrections: Tensor, dim: int) -> Gains:
        """From weights and targets [...] and corrections [..., m], summed over positions `dim`."""
        weighted = corrections * n[..., None]
        return Gains((weighted * target[..., None]).sum(dim), (weighted[..., :, None] * corrections[..., None, :]).sum(dim))


def cautious_strengths(gains: Gains, counted: Tensor, start: Tensor) -> Tensor:
    """[..., m] the strengths whose gain over `start` is largest after CAUTION standard errors are taken off; `start` if none is positive.

    Shapes: gains over [..., units], counted [..., units] bool which units may be looked at, start [..., m].
    """
    m = start.shape[-1]
    steps = torch.linspace(0, 1, STEPS, dtype=torch.float64, device=start.device)
    grid = torch.cartesian_prod(*[steps] * m).reshape(-1, m)
    candidates = torch.cat([start[..., None, :], grid.expand(*start.shape[:-1], -1, m)], dim=-2)  # [..., c, m]
    linear = gains.linear @ candidates.transpose(-1, -2)
    products = (candidates[..., :, None] * candidates[..., None, :]).flatten(-2)
    gain = 2 * linear - gains.quadratic.flatten(-2) @ products.transpose(-1, -2)  # [..., units, c]
    gain = torch.where(counted[..., None], gain - gain[..., :1], 0.0)
    number = counted.sum(dim=-1).clamp(min=1)[..., None]
    mean = gain.sum(dim=-2) / number
    deviation = torch.where(counted[..., None], gain - mean[..., None, :], 0.0).square().sum(dim=-2)
    error = (deviation / number / (number - 1).clamp(min=1)).sqrt() * (1 + SMALL_SAMPLE / number)
    best = (mean - CAUTION * error).argmax(dim=-1)
    return candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, m))[..., 0, :]


def tilted_centre(batch: GroupedBatch) -> Tensor:
    """[K, G] mean reward of the others, moved to the best single baseline as far as reward and log-ratio surely go together.

        c_i + (1 - CERTAINTY^2 / z_i^2)_+ (sum_j rho_j^2 R_j / sum_j rho_j^2 - c_i),   z_i = sqrt(n - 3) atanh(r_i)

    over the n others j of the group, rho their ratio of the whole response and r_i the correlation of log rho and R among them.

    Source: the weighted mean minimises sum_j rho_j^2 (R_j - b)^2; z is about standard normal without a correlation (Fisher 1921, On the
    "probable error" of a coefficient of correlation); the positive part is that of James and Stein.

    Conventions: the weighted mean rests on the few largest ratios and cannot say how sure it is, while the correlation with the logarithm rests
    on all responses. Groups of at most 4 keep the mean, and so does a response whose others have equal ratios or equal rewards.
    Sums over the others are formed without their total, so that not even rounding knows the response.
    """
    size = batch.rewards.shape[1]
    others = (batch.present[:, None, :] & ~torch.eye(size, dtype=torch.bool, device=batch.rewards.device)).double()  # [K, i, j]
    number = others.sum(dim=2)

    def over_others(values: Tensor) -> Tensor:
        return (others @ values[..., None])[..., 0]

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        count = number.clamp(min=1)
        return over_others(a * b) / count - over_others(a) * over_others(b) / count.square()

    rewards, squared = batch.rewards, batch.final.square()
    logs = torch.where(batch.present, batch.final.clamp(min=TINY).log(), 0.0)
    spread = (covariance(logs, logs) * covariance(rewards, rewards)).clamp(min=0).sqrt()
    correlation = (covariance(logs, rewards) / spread.clamp(min=TINY)).clamp(-1 + 1e-12, 1 - 1e-12)
    z_squared = (number - 3).clamp(min=0) * correlation.atanh().square()
    certain = (1 - CERTAINTY**2 / z_squared.clamp(min=TINY)).clamp(min=0)
    best = over_others(squared * rewards) / over_others(squared).clamp(min=TINY)
    return batch.centre + certain * (best - batch.centre)


def starting_strength(size: Tensor, ratio_sum: Tensor, square_sum: Tensor, number: Tensor) -> Tensor:
    """E^2 / (E^2 + HALF_STRENGTH^2), E = size times the share of effective responses, (sum rho)^2 / (number sum rho^2)."""
    effective = size * ratio_sum.square() / (number * square_sum).clamp(min=TINY)
    return effective.square() / (effective.square() + HALF_STRENGTH**2)


def sampled(batch: GroupedBatch) -> Tensor:
    """At most SAMPLED_POSITIONS positions, evenly over what the layers span, as far as there are responses."""
    span = batch.layers.span
    number = min(SAMPLED_POSITIONS, span)
    positions = torch.arange(number, device=batch.ratios.device) * span // number
    return positions[positions < batch.ratios.shape[2]]


def lone_group_strengths(batch: GroupedBatch, n: Tensor, ridge: float) -> Tensor:
    """[1, G] strength of the group's own fit for each response of a batch of one group, from all pairs of the others.

    The gains are over the plain mean of the others, whatever `tilted_centre` makes of it.
    With i and j both left out, the residuals are (M_SS)^-1 (M y)_S for S = {i, j} and M = 1 - hat matrix: closed, so no fit is repeated.
    """
    size = batch.rewards.shape[1]
    linear = batch.final.new_zeros(size, size, 1)
    quadratic = linear[..., None].clone()
    positions = sampled(batch)
    for part in positions.split(max(1, (1 << 20) // size**2)):
        correction, target = _pair_corrections(batch, part, ridge)
        weight = n[0, :, part].T[:, None].expand_as(correction)
        gains = Gains.of(weight, target.expand_as(correction), correction[..., None], dim=0)
        linear, quadratic = linear + gains.linear, quadratic + gains.quadratic
    others = batch.present[0] & ~torch.eye(size, dtype=torch.bool, device=n.device)  # [i, j]
    rho = batch.final[0].expand(size, size) * others
    number = others.sum(dim=1)
    start = starting_strength(number + 1, rho.sum(dim=1), rho.square().sum(dim=1), number)
    return cautious_strengths(Gains(linear, quadratic), others, start[:, None])[None, :, 0]


def _pair_corrections(batch: GroupedBatch, positions: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """[t, i, j] correction for j without i and j, and [i, j] what it should be."""
    rewards, final = batch.rewards[0], batch.final[0]
    others = (batch.present.sum() - 2).clamp(min=1)
    centre = (rewards.sum() - rewards[:, None] - rewards) / others  # [i, j] mean without both
    inverse, roots = (array[0] for array in inverse_kernel(batch, positions, ridge)[:2])
    own = inverse.diagonal(dim1=1, dim2=2)
    both = inverse @ (targets(batch)[0] * roots[..., None])  # [t, j, 2]
    determinant = (own[:, :, None] * own[:, None, :] - inverse.square()).clamp(min=TINY)
    residual = (both[:, None] * own[:, :, None, None] - inverse[..., None] * both[:, :, None]) / determinant[..., None]
    residual = residual / roots.clamp(min=TINY)[:, None, :, None]
    target = final * (rewards - centre)
    return target - (residual[..., 0] - centre * residual[..., 1]), target


def fold_strengths(batch: GroupedBatch, n: Tensor, ridge: float, *, pooled: bool, own: bool) -> Tensor:
    """[F, 2] strengths of the pooled fit and of the groups' own for the groups of each fold, from the other folds alone.

    For fold f, every other fold g is predicted by a pooled fit that saw neither f nor g, and by its groups' own leave-one-out fits.
    """
    positions = sampled(batch)
    fold = fold_of_group(len(batch.rewards), n.device)
    number = int(fold.max()) + 1
    within = group_corrections(batch, positions, ridge) if own else torch.zeros_like(batch.ratios[:, :, positions])
    shared = (
        held_out_predictions(batch, positions, ridge, by_cholesky)
        if pooled and number > 2
        else within.new_zeros(number, *within.shape)
    )
    rho = batch.final * batch.present
    sizes = batch.present.sum(dim=1).double()
    strengths = torch.zeros(number, 2, dtype=torch.float64, device=n.device)
    for f in range(number):
        seen = fold != f
        gains = Gains.of(n[seen][:, :, positions], batch.base[seen][..., None], torch.stack([shared[f], within], -1)[seen], dim=2)
        start = starting_strength(sizes[seen].mean(), rho[seen].sum(), rho[seen].square().sum(), sizes[seen].sum())
        allowed = torch.stack([torch.zeros_like(start), start * own])
        strengths[f] = cautious_strengths(
            Gains(gains.linear.flatten(0, 1), gains.quadratic.flatten(0, 1)), batch.present[seen].flatten(), allowed
        )
    return strengths
