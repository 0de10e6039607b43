"""Shrinkage coefficients and the weighted leave-one-out baseline."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import (
    hierarchical_advantages,
)
from rlsys.algorithms.advantages.grouping import others_mean
from rlsys.algorithms.advantages.hierarchical.grouped_batch import GroupedBatch
from rlsys.algorithms.advantages.hierarchical.horizons import Horizons
from rlsys.algorithms.advantages.hierarchical.shrinkage import (
    Gains,
    cautious_shrinkage,
    weighted_baseline,
)
from tests.support.hierarchical_examples import LearnedPrompt, joined


def test_weighted_baseline_against_its_formula_for_each_response():
    """Rewards depend on the weights in one group and not in the other two.

    With few responses and with equal weights the plain baseline stays.
    """
    generator = torch.Generator().manual_seed(1)
    logs = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    rewards = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    rewards[0] = logs[0] + 0.1 * rewards[0]
    present = torch.ones(3, 12, dtype=torch.bool)
    # The weight is the squared ratio times the norms: the square of exp(logs).
    ratios = (logs / 2).exp()[..., None]
    mass = torch.stack([logs.exp(), torch.ones_like(logs)], dim=-1)
    horizons = Horizons.of("final", 1, 1)
    batch = GroupedBatch(
        ratios, rewards, others_mean(rewards, present), present, ratios, mass, horizons
    )
    found = weighted_baseline(batch)
    for k, i in itertools.product(range(3), range(12)):
        j = [other for other in range(12) if other != i]
        light, heavy = ratios[k, j, 0] ** 0.25 * logs[k, j].exp(), (2 * logs[k, j]).exp()
        r = torch.corrcoef(torch.stack([logs[k, j], rewards[k, j]]))[0, 1]
        certain = max(0.0, float(1 - 16 / (8 * r.atanh() ** 2)))
        assert (certain > 0.5) == (k == 0)
        # 8 / (8 + HALF_WEIGHTED) of the way to the mildly weighted mean
        mild = (rewards[k, j].mean() + (light @ rewards[k, j]) / light.sum()) / 2
        best = (heavy @ rewards[k, j]) / heavy.sum()
        assert float(found[k, i]) == pytest.approx(float((1 - certain) * mild + certain * best))
    few = replace(batch, present=torch.arange(12).expand(3, 12) < 4)
    assert torch.equal(weighted_baseline(few), few.baseline)
    same = replace(batch, ratios=torch.ones_like(ratios), mass=torch.ones_like(mass))
    assert torch.allclose(weighted_baseline(same), same.baseline, atol=1e-14)


def test_shrinkage_leaves_its_start_for_a_gain_beyond_its_error():
    """Corrections are half of the best ones (best shrinkage on the grid: 1), zero, and noise."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    ones, start = (
        torch.ones(60, 8, 1, dtype=torch.float64),
        torch.tensor([0.0, 0.3], dtype=torch.float64),
    )

    def chosen(pooled: Tensor, own: Tensor, groups: int = 60) -> list[float]:
        corrections = torch.stack([pooled, own], dim=-1)[:groups, :, None]
        return cautious_shrinkage(
            Gains.of(ones[:groups], target[:groups], corrections), start
        ).tolist()

    assert chosen(target / 2, 0 * target)[0] == 1.0
    assert chosen(0 * target, target / 2)[1] == 1.0
    assert chosen(0 * target, 0 * target) == start.tolist()
    assert chosen(0 * target, 3 * noise)[1] == 0.0
    assert (
        chosen(target / 2, 0 * target, groups=1) == start.tolist()
    )  # one group cannot say how sure it is
    assert (
        chosen(target / 20, 0 * target, groups=3) == start.tolist()
    )  # nor can three of a small gain


@pytest.mark.parametrize("groups", [2, 3, 12])
@pytest.mark.parametrize(
    ("scope", "unused"), [("group", "shrinkage_batch"), ("batch", "shrinkage_group")]
)
def test_a_scope_uses_its_own_fit_alone(scope: str, unused: str, groups: int):
    """A fit that is not in use has the gain 0 at every shrinkage, so rounding would choose."""
    prompts = [LearnedPrompt(seed) for seed in range(groups)]
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        batch = joined(prompts, [p.draw(16, generator) for p in prompts])
        assert hierarchical_advantages(batch, scope=scope).diagnostics[unused] == 0
