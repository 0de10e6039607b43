"""The regression over groups: baselines of a group predicted from the groups of other folds.

Its features are those of `Horizons` times the variance v_i of the rewards of the other responses of
i's group. The difference between the mean reward and the best baseline is a covariance of reward
and ratio. After steps along the policy gradient it grows with the variance of the group's rewards.
Where the rewards of the other responses are all equal, the prediction is 0.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical.group_regression import (
    chunks,
    power_of_two,
    ridged,
)
from rlsys.algorithms.advantages.hierarchical.grouped_batch import GroupedBatch, others_variance

FOLDS = 8


def fold_of_group(groups: int, device: torch.device) -> Tensor:
    """Return [K] the fold of each group: assigned in turn, as many folds as groups up to FOLDS."""
    return torch.arange(groups, device=device) % min(FOLDS, groups)


def folds_of(batch: GroupedBatch) -> list[GroupedBatch]:
    """Return the groups of each fold."""
    fold = fold_of_group(len(batch.rewards), batch.rewards.device)
    return [batch.groups(fold == f) for f in range(int(fold.max()) + 1)]


@dataclass(frozen=True)
class FoldSums:
    """Normal equations of the pooled regression at some positions, one set per fold."""

    gram: Tensor  # [F, t, p, p] sum of n x x^T
    moment: Tensor  # [F, t, p] sum of n x y, y the weight under the leave-one-out baseline
    scale: Tensor  # [F, 2] sum of v^2, and number of responses
    mass: Tensor  # [F, 2] sum of the squared score norms, and their number

    @staticmethod
    def of(folds: list[GroupedBatch], positions: Tensor) -> FoldSums:
        """Return the sums of all folds."""
        sums = [_sums(fold, positions) for fold in folds]
        return FoldSums(*(torch.stack(arrays) for arrays in zip(*sums, strict=True)))

    def coefficients(self, left_out: tuple[int, ...], ridge: float) -> Tensor:
        """Return [t, p] fitted on the other folds; 0 where no group there has different rewards."""
        kept = [f for f in range(len(self.gram)) if f not in left_out]
        gram, moment, scale, mass = (
            _sum_of(array, kept) for array in (self.gram, self.moment, self.scale, self.mass)
        )
        squares, responses = scale
        if not squares > 0:
            return torch.zeros_like(moment)

        # The unit of the ridge, one response with all ratios 1, is scaled like the features.
        system = ridged(gram, ridge * power_of_two(mass) * squares / responses)
        return torch.cholesky_solve(moment[..., None], torch.linalg.cholesky(system))[..., 0]


def _sum_of(array: Tensor, kept: list[int]) -> Tensor:
    """Return the sum of those entries of the first dimension, without copying them."""
    total = torch.zeros_like(array[0])
    for f in kept:
        total += array[f]
    return total


def _sums(part: GroupedBatch, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `FoldSums` of one fold: [t, p, p], [t, p], [2], [2].

    The fixed horizons are the same at every t, so all t take their products from one matrix.
    """
    horizons = part.horizons
    v = others_variance(part.rewards, part.present).flatten()
    fixed = horizons.fixed(part.ratios).flatten(0, 1)  # [B, S]
    held = horizons.held(positions)  # [t, S]

    # [B, t] weights times v, once for each factor x: x y has one, x x^T two
    n = part.weights[:, :, positions].flatten(0, 1) * v[:, None]
    nx = n * v[:, None]

    products = (fixed[:, :, None] * fixed[:, None, :]).flatten(1)
    gram = (nx.T @ products).unflatten(1, (fixed.shape[1],) * 2)
    gram = gram * held[:, :, None] * held[:, None, :]

    target = part.base.flatten()
    moment = (n * target[:, None]).T @ fixed * held

    if horizons.current:
        now = part.ratios[:, :, positions].flatten(0, 1)  # [B, t]
        cross = (nx * now).T @ fixed * held
        corner = (nx * now**2).sum(0)[:, None]
        upper = torch.cat([gram, cross[:, :, None]], 2)
        lower = torch.cat([cross, corner], 1)[:, None]
        gram = torch.cat([upper, lower], 1)
        moment = torch.cat([moment, (n * now * target[:, None]).sum(0)[:, None]], 1)

    count = horizons.count(positions)
    scale = torch.stack([v.square().sum(), part.present.sum().double()])
    mass = part.mass.sum(dim=(0, 1))
    return gram / count[:, None, None], moment / count.sqrt()[:, None], scale, mass


def _predicted(part: GroupedBatch, positions: Tensor, beta: Tensor) -> Tensor:
    """Return [K, G, t] features times coefficients [t, p]."""
    horizons = part.horizons
    scaled = beta / horizons.count(positions).sqrt()[:, None]
    number = len(horizons.base)
    fitted = horizons.fixed(part.ratios) @ (scaled[:, :number] * horizons.held(positions)).T
    if horizons.current:
        fitted = fitted + part.ratios[:, :, positions] * scaled[:, number]
    v = others_variance(part.rewards, part.present)[..., None]
    return torch.where(part.weights[:, :, positions] > 0, fitted * v, 0.0)


def held_out_predictions(batch: GroupedBatch, positions: Tensor, ridge: float) -> Tensor:
    """Return [F, K, G, t] held-out predictions, for each fold that is left out.

    The groups of every other fold are predicted by the fit that saw neither of the two folds. The
    groups of the fold itself get 0.
    """
    fold = fold_of_group(len(batch.rewards), positions.device)
    folds = folds_of(batch)
    sums = FoldSums.of(folds, positions)
    predicted = batch.ratios.new_zeros(len(folds), *batch.rewards.shape, len(positions))

    for f, g in itertools.combinations(range(len(folds)), 2):
        beta = sums.coefficients((f, g), ridge)
        predicted[f, fold == g] = _predicted(folds[g], positions, beta)
        predicted[g, fold == f] = _predicted(folds[f], positions, beta)
    return predicted


def pooled_corrections(
    batch: GroupedBatch, positions: Tensor, ridge: float, shrinkage: Tensor | None = None
) -> Tensor:
    """Return [K, G, t] the corrections fitted on the other folds.

        f_i(t) = v_i sum_s rho_{<=s, i} beta_{t, -fold(i)}^(s)

    v_i is the variance of the rewards of the other responses of i's group.

    Source: docs/hierarchical_derivation.md, section 8.

    Conventions: `shrinkage` [F] multiplies the corrections of each fold's groups; folds at 0 are
    not solved. None: 1 for all. With a single fold there are no other groups to fit, and the result
    is 0.
    """
    members = fold_of_group(len(batch.rewards), positions.device)
    folds = folds_of(batch)
    if shrinkage is None:
        shrinkage = torch.ones(len(folds), dtype=torch.float64, device=positions.device)

    corrections = torch.zeros_like(batch.ratios[:, :, positions])
    solved = shrinkage.nonzero()[:, 0].tolist()
    numbers_per_position = len(folds) * (batch.horizons.most + 1) ** 2
    start = 0
    for part in chunks(positions, numbers_per_position):
        sums = FoldSums.of(folds, part)
        end = start + len(part)
        for f in solved:
            predicted = _predicted(folds[f], part, sums.coefficients((f,), ridge))
            corrections[members == f, :, start:end] = shrinkage[f] * predicted
        start = end
    return corrections
