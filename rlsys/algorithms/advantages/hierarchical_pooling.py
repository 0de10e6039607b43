"""The regression over groups: what the groups of other folds say about a group's best baselines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical_fits import GroupedBatch, Solve, chunks, others_variance, ridged

FOLDS = 8


def fold_of_group(groups: int, device: torch.device) -> Tensor:
    """[K] fold of each group: dealt in turn, as many folds as groups up to FOLDS."""
    return torch.arange(groups, device=device) % min(FOLDS, groups)


def pooled_features(batch: GroupedBatch, positions: Tensor) -> Tensor:
    """[K, t, G, p] features of the layers times the variance of the rewards of the others of the group.

    The distance from the mean reward to the best baseline is a covariance of reward and ratio. After steps along the policy gradient it
    grows with the variance of the group's rewards, and where all others agree there is nothing to expect: 0.
    """
    scale = others_variance(batch.rewards, batch.present)
    return batch.layers.features(batch.ratios, positions) * scale[:, None, :, None]


@dataclass(frozen=True)
class FoldSums:
    """Normal equations of the pooled regression at some positions, one set a fold."""

    gram: Tensor  # [F, t, p, p] sum of n x x^T
    moment: Tensor  # [F, t, p] sum of n x y, y the weight under the centre
    scale: Tensor  # [F, 2] sum of the squares of what scales the features, and responses

    @staticmethod
    def of(batch: GroupedBatch, positions: Tensor) -> FoldSums:
        fold = fold_of_group(len(batch.rewards), positions.device)
        grams, moments, scales = [], [], []
        for f in range(int(fold.max()) + 1):
            part = batch.groups(fold == f)
            n = part.weights[:, :, positions].movedim(2, 0).flatten(1)  # [t, K * G]
            x = pooled_features(part, positions).transpose(0, 1).flatten(1, 2)  # [t, K * G, p]
            weighted = (x * n[..., None]).transpose(1, 2)
            grams.append(weighted @ x)
            moments.append((weighted @ part.base.flatten()[None, :, None])[..., 0])
            squares = others_variance(part.rewards, part.present).square()[part.present].sum()
            scales.append(torch.stack([squares, part.present.sum().double()]))
        return FoldSums(torch.stack(grams), torch.stack(moments), torch.stack(scales))

    def coefficients(self, left_out: tuple[int, ...], ridge: float, solve: Solve) -> Tensor:
        """[t, p] fitted on all folds but those; 0 where they have no spread of rewards to learn from."""
        kept = torch.ones(len(self.gram), dtype=torch.bool, device=self.gram.device)
        kept[list(left_out)] = False
        squares, responses = self.scale[kept].sum(dim=0)
        if not squares > 0:
            return torch.zeros_like(self.moment[0])
        # what counts as one response with all ratios 1 is scaled like the features
        return solve(ridged(self.gram[kept].sum(dim=0), ridge * squares / responses), self.moment[kept].sum(dim=0))


def pooled_corrections(
    batch: GroupedBatch, positions: Tensor, ridge: float, solve: Solve, *, left_out: bool = True, strengths: Tensor | None = None
) -> Tensor:
    """[K, G, t] what the layers fitted on the other folds add to the centre.

        f_i(t) = v_i sum_s rho_{<=s, i} beta_{t, -fold(i)}^(s),   v_i the variance of the rewards of the others of i's group

    Source: references/hierarchical_token_baselines.md, section 7, with cross-fitting over groups.

    Conventions: `strengths` [F] multiplies the corrections of each fold's groups; folds at 0 are not solved. `left_out=False` fits on all
    folds, which is biased.
    """
    fold = fold_of_group(len(batch.rewards), positions.device)
    number = int(fold.max()) + 1
    strengths = torch.ones(number, dtype=torch.float64, device=positions.device) if strengths is None else strengths
    parts = []
    for part in chunks(positions, max(batch.rewards.numel(), number * batch.layers.most) * (batch.layers.most + 2)):
        sums = FoldSums.of(batch, part)
        x = pooled_features(batch, part)
        corrections = torch.zeros_like(batch.ratios[:, :, part])
        for f in strengths.nonzero()[:, 0].tolist():
            beta = sums.coefficients((f,) if left_out else (), ridge, solve)
            corrections[fold == f] = strengths[f] * (x[fold == f] @ beta[None, :, :, None])[..., 0].transpose(1, 2)
        parts.append(torch.where(batch.weights[:, :, part] > 0, corrections, 0.0))
    return torch.cat(parts, dim=2)
