"""The regression within a group against refitting."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    hierarchical_advantages,
    rloo_advantages,
)
from rlsys.algorithms.advantages.hierarchical.group_regression import power_of_two
from tests.support.enumerable_policy import Enumerated
from tests.support.hierarchical_examples import HORIZONS


def refitted(drawn: AdvantageInputs, horizons: str, ridge: float) -> Tensor:
    """Return [B, T] weights from one regression per response and position.

    Each is on the other responses of the group, by the definition of Delta.
    """
    ratios = (drawn.old_logprobs - drawn.rollout_logprobs).cumsum(1).exp()  # type: ignore[operator]
    length = ratios.shape[1]
    out = torch.zeros_like(ratios)
    for i, t in itertools.product(range(len(ratios)), range(length)):
        if not drawn.response_mask[i, t]:
            continue
        others = (drawn.group_ids == drawn.group_ids[i]).nonzero()[:, 0]
        others = others[others != i]
        baseline = drawn.rewards[others].mean()
        chosen = {
            "final": [length - 1],
            "current": [t],
            "current_and_final": [t, length - 1],
            "all": list(range(t, length)),
        }
        chosen["blocks"] = [t, *(s for s in range(1, length - 1, 2) if s >= t), length - 1]
        alpha = ratios[:, chosen[horizons]] / ratios[:, t : t + 1]
        features = alpha / len(chosen[horizons]) ** 0.5
        target = ratios[:, -1] / ratios[:, t] * (drawn.rewards - baseline)
        assert drawn.squared_score_norms is not None
        norms, tokens = drawn.squared_score_norms * drawn.response_mask, drawn.response_mask.sum(1)
        w = ratios[:, t] ** 2 * (norms[:, t] + norms.sum(1) / tokens) / 2
        unit = torch.exp2((norms[others].sum() / tokens[others].sum()).log2().round())
        others = others[drawn.response_mask[others, t]]
        x, z, w = features[others], target[others], w[others]
        # the ridge is on coefficients of x = rho: the same as here, since those of alpha are the
        # same beta
        gram = (x * w[:, None]).T @ x + ridge * unit * torch.eye(x.shape[1], dtype=torch.float64)
        beta = torch.linalg.solve(gram, (x * w[:, None]).T @ z)
        out[i, t] = ratios[i, t] * (target[i] - features[i] @ beta)
    return out


@pytest.mark.parametrize("horizons", HORIZONS)
def test_leave_one_out_in_closed_form_is_refitting(horizons: str):
    """Both forms of the regression agree with the definition, for groups of any size and order.

    Groups of 3 have fewer responses than horizons, groups of 9 more.
    """
    made = Enumerated(8, end_token=True, size=(3, 5))
    drawn = made.drawn(1, 19)
    order = torch.randperm(19, generator=made.generator)
    for ids in (torch.arange(19) // 3, torch.arange(19) // 9):
        ids[-1] = ids[-2]
        batch = replace(drawn, group_ids=ids[order])
        told: dict[str, Any] = {"horizons": horizons, "ridge": 0.7, "block_size": 2}
        out = hierarchical_advantages(batch, diagnostics=False, **told).advantages.double()
        assert torch.allclose(out, refitted(batch, horizons, 0.7), atol=2e-5, rtol=1e-4)


def test_a_ridge_counts_in_the_score_norms_of_the_others():
    """A policy whose squared score norms are all 1/8 as large gets the same baselines.

    One that is certain of every token has squared norms of 0 and gets RLOO's baselines.
    """
    drawn = Enumerated(9).drawn(5, 8)
    assert drawn.squared_score_norms is not None
    out = hierarchical_advantages(drawn, diagnostics=False).advantages
    smaller = hierarchical_advantages(
        replace(drawn, squared_score_norms=drawn.squared_score_norms / 64), diagnostics=False
    ).advantages
    assert torch.allclose(out, smaller, rtol=1e-6)
    certain = hierarchical_advantages(
        replace(drawn, squared_score_norms=drawn.squared_score_norms * 0), diagnostics=False
    ).advantages
    assert drawn.old_logprobs is not None
    assert drawn.rollout_logprobs is not None
    ratio = (drawn.old_logprobs - drawn.rollout_logprobs).sum(1, keepdim=True).exp()
    assert torch.allclose(certain, ratio.float() * rloo_advantages(drawn).advantages, rtol=1e-5)
    assert power_of_two(
        torch.tensor([[3.0, 4.0], [8.9, 8.0], [0.0, 3.0], [1.0, 0.0]])
    ).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert power_of_two(torch.tensor([[0.7, 4.0], [9.0, 2.0]])).tolist() == [0.125, 4.0]
