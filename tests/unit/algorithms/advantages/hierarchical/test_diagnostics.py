"""Variance ratios and effective sample sizes."""

from __future__ import annotations

import pytest
import torch

from rlsys.algorithms.advantages import (
    hierarchical_advantages,
)
from rlsys.algorithms.advantages.hierarchical.diagnostics import effective_fractions
from tests.support.enumerable_policy import Enumerated


def test_diagnostics_compare_every_baseline_at_the_same_positions():
    drawn = Enumerated(13, end_token=True).drawn(6, 8)
    found = hierarchical_advantages(drawn, log_ratio_clip=0.5).diagnostics
    names = {
        "none",
        "group_mean",
        "leave_one_out",
        "opo",
        "optimal_token",
        "used",
        "final",
        "current",
        "current_and_final",
        "blocks",
    }
    assert {key.split("/")[1] for key in found if key.startswith("variance_ratio/")} == names
    assert found["variance_ratio/leave_one_out"] == 1
    assert found["variance_ratio/used"] == pytest.approx(
        found["variance_ratio/current_and_final"], rel=1e-6
    )  # the default horizons
    assert found["won"] == float(found["variance_ratio/used"] < 1)
    assert 0 < found["clip_fraction"] < 1
    shares = [name for name in found if name.startswith("effective_fraction/")]
    assert shares == [
        f"effective_fraction/at_{percent}"
        for percent in ["000", "012", "025", "037", "050", "062", "075", "087", "100"]
    ]
    assert shares == sorted(shares)
    assert 0 < found["effective_fraction/at_100"] < found["effective_fraction/at_000"] <= 1
    assert found["condition_number"] >= 1


def test_effective_fractions_over_position():
    """Two responses of 3 tokens have ratios (1, 3) at the middle: (1 + 3)^2 / (2 (1 + 9)) = 0.8.

    One is left at the end: 1.
    """
    ratios = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 3.0, 9.0]]], dtype=torch.float64)
    alive = torch.tensor([[[True, True, False], [True, True, True]]])
    found = effective_fractions(ratios, alive)
    assert [
        found[f"effective_fraction/at_{percent}"] for percent in ("000", "037", "050", "087", "100")
    ] == [1, 1, 0.8, 0.8, 1]
    alive[:, :, 1] = False  # a tool's token, in both
    assert list(effective_fractions(ratios, alive)) == [
        f"effective_fraction/at_{percent}" for percent in ("000", "012", "025", "037", "100")
    ]
