"""How far hierarchical baselines may leave the leave-one-out mean: strengths read from responses that they are not used on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical_fits import (
    GroupedBatch,
    NormalEquations,
    chunks,
    group_corrections,
    inverse_kernel,
    pooled_features,
)

SAMPLED_POSITIONS = 64  # strengths are one number for all positions: these many, evenly spread, are enough to read it
FOLDS = 8
FEWEST_OTHERS = 12  # responses a strength must be read from; with fewer its own noise costs more than it gains
CAUTION = 1.0  # standard errors by which the estimated gain is lowered before strengths are compared
STEPS = 9  # candidates for each strength: 0, 1/8, ... 1


@dataclass(frozen=True)
class Gains:
    """What corrections would have saved on units (groups or responses) that the fits had not seen.

    With y the weight under the leave-one-out mean and f the corrections, sum n y^2 - sum n (y - gamma . f)^2 = 2 gamma . u - gamma V gamma.
    """

    linear: Tensor  # [..., units, m] u
    quadratic: Tensor  # [..., units, m, m] V

    @staticmethod
    def of(loss_weights: Tensor, target: Tensor, corrections: Tensor, dims: tuple[int, ...]) -> Gains:
        """From weights and targets [...] and corrections [..., m], summed over `dims`."""
        weighted = corrections * loss_weights[..., None]
        return Gains(
            (weighted * target[..., None]).sum(dims),
            (weighted[..., :, None] * corrections[..., None, :]).sum(dims),
        )


def cautious_strengths(gains: Gains, counted: Tensor, caution: float = CAUTION) -> Tensor:
    """[..., m] strengths in [0, 1] with the largest gain that is still there `caution` standard errors below its mean over units.

    Zero, which is the leave-one-out mean, has gain and error 0, so it wins whenever nothing else is clearly better. `counted` [..., units]
    says which units may be looked at.
    """
    m = gains.linear.shape[-1]
    steps = torch.linspace(0, 1, STEPS, dtype=torch.float64, device=counted.device)
    candidates = torch.cartesian_prod(*[steps] * m).reshape(-1, m)
    gain = 2 * gains.linear @ candidates.T - torch.einsum("...mk,cm,ck->...c", gains.quadratic, candidates, candidates)
    number = counted.sum(-1).clamp(min=1)[..., None]
    gain = torch.where(counted[..., None], gain, 0.0)
    mean = gain.sum(-2) / number
    deviation = torch.where(counted[..., None], gain - mean[..., None, :], 0.0).square().sum(-2)
    error = (deviation / (number - 1).clamp(min=1) / number).sqrt()
    return candidates[(mean - caution * error).argmax(-1)]


def sampled(positions: int, device: torch.device) -> Tensor:
    """At most SAMPLED_POSITIONS positions, each in the middle of an equal part of the response."""
    number = min(SAMPLED_POSITIONS, positions)
    return ((torch.arange(number, device=device) + 0.5) * positions / number).long()


def lone_group_strengths(batch: GroupedBatch, loss_weights: Tensor, ridge: float) -> Tensor:
    """[1, G] strength of the group's own fit for each response of a batch of one group, from all pairs of the others.

    With i and j both left out, the residuals are (M_SS)^-1 (M y)_S for S = {i, j} and M = 1 - hat matrix: closed, so no fit is repeated.
    """
    size = batch.rewards.shape[1]
    others = batch.present.sum(dim=1).item() - 2
    centre = (batch.rewards.sum() - batch.rewards[0, :, None] - batch.rewards[0]) / max(others, 1)  # [i, j] mean without both
    target = batch.final[:, None] * (batch.rewards[:, None] - centre)  # [1, i, j]
    linear, quadratic = torch.zeros(2, size, size, 1, dtype=torch.float64, device=target.device)
    for part in chunks(sampled(batch.ratios.shape[2], target.device), size * size * 3):
        inverse, roots = inverse_kernel(batch, part, ridge)
        own = inverse.diagonal(dim1=2, dim2=3)
        y = torch.stack([batch.final * batch.rewards, batch.final], -1)[:, None] * roots[..., None]
        both = inverse @ y
        determinant = (own[..., :, None] * own[..., None, :] - inverse.square()).clamp(min=1e-300)
        residual = (both[:, :, None] * own[..., None, None] - inverse[..., None] * both[:, :, :, None]) / determinant[..., None]
        residual = residual / roots.clamp(min=1e-100)[:, :, None, :, None]
        correction = target[:, None] - (residual[..., 0] - centre * residual[..., 1])  # [1, t, i, j]
        n = loss_weights[:, :, part].transpose(1, 2)[:, :, None]
        gains = Gains.of(n.expand_as(correction), target[:, None].expand_as(correction), correction[..., None], dims=(0, 1))
        linear, quadratic = linear + gains.linear, quadratic + gains.quadratic[..., 0]
    counted = (batch.present & ~torch.eye(size, dtype=torch.bool, device=target.device)) & batch.present.T
    return cautious_strengths(Gains(linear, quadratic[..., None]), counted)[None, :, 0]


@dataclass(frozen=True)
class Folds:
    """Groups dealt into folds, and the pooled regression of each fold at some positions."""

    of_group: Tensor  # [K] fold of each group
    number: int
    gram: Tensor  # [F, t, p, p]
    moment: Tensor  # [F, t, p]
    spread: Tensor  # [F, 2] sum of the squared variances that scale the features, and responses

    @staticmethod
    def deal(groups: int, device: torch.device) -> tuple[Tensor, int]:
        number = min(FOLDS, groups)
        return torch.arange(groups, device=device) % number, number

    @staticmethod
    def at(batch: GroupedBatch, positions: Tensor) -> Folds:
        of_group, number = Folds.deal(len(batch.rewards), positions.device)
        parts = [batch.groups(of_group == fold) for fold in range(number)]
        equations = [NormalEquations.of(part, positions) for part in parts]
        spread = torch.stack(
            [torch.stack([part.others_variance.square()[part.present].sum(), part.present.sum().double()]) for part in parts]
        )
        return Folds(
            of_group,
            number,
            torch.stack([e.gram for e in equations]),
            torch.stack([e.moment for e in equations]),
            spread,
        )

    def coefficients(self, left_out: Tensor, ridge: float) -> Tensor:
        """[t, p] of the regression over all folds but `left_out`; 0 where those have no spread of rewards to learn from."""
        kept = torch.ones(self.number, dtype=torch.bool, device=left_out.device)
        kept[left_out] = False
        squares, responses = self.spread[kept].sum(0)
        if not squares > 0:
            return torch.zeros_like(self.moment[0])
        gram = self.gram[kept].sum(0)
        # features are scaled by variances: so is what counts as one response
        gram.diagonal(dim1=1, dim2=2).add_(ridge * squares / responses)
        return torch.cholesky_solve(self.moment[kept].sum(0)[..., None], torch.linalg.cholesky(gram))[..., 0]


def fold_strengths(batch: GroupedBatch, loss_weights: Tensor, scope: str, group_ridge: float, batch_ridge: float) -> Tensor:
    """[F, 2] strengths of the pooled fit and of the group's own for the groups of each fold, from the other folds alone.

    For fold f, every other fold g is predicted by a pooled fit that saw neither f nor g, and by its groups' own leave-one-out fits.
    """
    positions = sampled(batch.ratios.shape[2], batch.ratios.device)
    own = group_corrections(batch, positions, group_ridge) if scope != "batch" else torch.zeros_like(batch.ratios[:, :, positions])
    folds = Folds.at(batch, positions)
    pooled = scope != "group" and folds.number > 2
    features = pooled_features(batch, positions) if pooled else None
    strengths = torch.zeros(folds.number, 2, dtype=torch.float64, device=positions.device)
    n = loss_weights[:, :, positions]
    target = batch.base[..., None].expand_as(n)
    for fold in range(folds.number):
        shared = torch.zeros_like(own)
        for other in range(folds.number) if pooled else ():
            if other != fold:
                beta = folds.coefficients(torch.tensor([fold, other]), batch_ridge)
                members = folds.of_group == other
                assert features is not None
                shared[members] = torch.einsum("ktgp,tp->kgt", features[members], beta)
        gains = Gains.of(n, target, torch.stack([shared, own], -1), dims=(2,))
        counted = (batch.present & (folds.of_group != fold)[:, None]).flatten()
        if int(counted.sum()) >= FEWEST_OTHERS:
            strengths[fold] = cautious_strengths(Gains(gains.linear.flatten(0, 1), gains.quadratic.flatten(0, 1)), counted)
    return strengths
