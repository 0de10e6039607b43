"""The regression over groups against refitting, and what it may not have seen."""

import pytest
import torch

from rlsys.algorithms.advantages.grouping import others_mean
from rlsys.algorithms.advantages.hierarchical.group_regression import power_of_two
from rlsys.algorithms.advantages.hierarchical.grouped_batch import GroupedBatch, others_variance
from rlsys.algorithms.advantages.hierarchical.horizons import Horizons
from rlsys.algorithms.advantages.hierarchical.pooled_regression import (
    fold_of_group,
    held_out_predictions,
    pooled_corrections,
)
from tests.support.hierarchical_examples import HORIZONS

GROUPS, SIZE, LENGTH = 10, 5, 4


def random_batch(horizons: str) -> GroupedBatch:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    present = torch.ones(GROUPS, SIZE, dtype=torch.bool)
    rewards = noise(GROUPS, SIZE)
    weights = noise(GROUPS, SIZE, LENGTH).square()
    mass = torch.stack([weights.sum(2), torch.full((GROUPS, SIZE), float(LENGTH))], dim=-1)
    return GroupedBatch(
        ratios=(0.3 * noise(GROUPS, SIZE, LENGTH)).cumsum(2).exp(),
        rewards=rewards,
        baseline=others_mean(rewards, present),
        present=present,
        weights=weights,
        mass=mass.double(),
        horizons=Horizons.of(horizons, LENGTH, 2),
    )


@pytest.mark.parametrize("horizons", HORIZONS)
def test_each_fold_is_fitted_by_the_others(horizons: str):
    batch, positions = random_batch(horizons), torch.arange(LENGTH)
    found = pooled_corrections(batch, positions, ridge=1.5)
    fold = fold_of_group(GROUPS, batch.ratios.device)
    v = others_variance(batch.rewards, batch.present)
    x = batch.horizons.features(batch.ratios, positions) * v[:, None, :, None]  # [K, t, G, p]
    n = batch.weights.transpose(1, 2)
    for f in range(int(fold.max()) + 1):
        kept = fold != f
        unit = power_of_two(batch.mass[kept].sum((0, 1))) * v[kept].square().mean()
        for t in range(LENGTH):
            features, weights = x[kept, t].flatten(0, 1), n[kept, t].flatten()
            gram = features.T @ (features * weights[:, None])
            gram = gram + 1.5 * unit * torch.eye(len(gram), dtype=torch.float64)
            moment = features.T @ (weights * batch.base[kept].flatten())
            # A horizon before the position has feature 0, and the ridge alone: coefficient 0.
            beta = torch.linalg.solve(gram, moment)
            assert torch.allclose(found[fold == f, :, t], x[fold == f, t] @ beta, atol=1e-9)


def test_strengths_multiply_their_folds_alone():
    batch, positions = random_batch("current_and_final"), torch.arange(LENGTH)
    whole = pooled_corrections(batch, positions, ridge=1.0)
    shrinkage = torch.tensor([0.5, *[0.0] * 6, 1.0], dtype=torch.float64)
    found = pooled_corrections(batch, positions, 1.0, shrinkage)
    fold = fold_of_group(GROUPS, batch.ratios.device)
    assert torch.allclose(found, shrinkage[fold][:, None, None] * whole)


def test_a_held_out_prediction_has_seen_neither_fold():
    batch, positions = random_batch("final"), torch.arange(LENGTH)
    before = held_out_predictions(batch, positions, ridge=1.0)
    batch.rewards[0] *= 3.0  # of fold 0
    after = held_out_predictions(batch, positions, ridge=1.0)
    fold = fold_of_group(GROUPS, batch.ratios.device)
    others = fold != 0
    # With fold 0 left out, what was predicted for the others does not know of its rewards.
    assert torch.equal(before[0][others], after[0][others])
    assert not torch.equal(before[1][fold == 2], after[1][fold == 2])
