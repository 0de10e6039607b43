"""Importance weights for the mismatch between engine and trainer."""

import math
from typing import Any

import pytest
import torch

from rlsys.algorithms.policy_objectives import (
    rollout_correction,
)


def correction(logs: list[float], **settings: Any) -> list[float]:
    mask = torch.ones(1, len(logs), dtype=torch.bool)
    return rollout_correction(torch.tensor([logs]), torch.zeros(1, len(logs)), mask, **settings)[
        0
    ].tolist()


def test_rollout_correction_golden():
    two, half = math.log(2.0), math.log(0.5)
    assert correction([two, half, 0.0], level="token", cap=1.5) == pytest.approx([1.5, 0.5, 1.0])
    assert correction([two, two, half], level="sequence", cap=9.0) == pytest.approx(
        [2.0] * 3
    )  # 2 * 2 / 2
    assert correction([two, half, 0.0], level="token", mask_below=0.6) == pytest.approx(
        [2.0, 0.0, 1.0]
    )
    assert correction([two, half, 0.0], level="token", mask_above=1.9) == pytest.approx(
        [0.0, 0.5, 1.0]
    )
    assert correction([two, half], level="none") == [1.0, 1.0]


def test_rollout_correction_at_log_ratios_of_80():
    assert correction([80.0, -80.0], level="token", cap=2.0) == pytest.approx([2.0, 0.0], abs=1e-30)
    assert correction([80.0, 0.0], level="sequence", cap=3.0, mask_above=10.0) == [0.0, 0.0]


def test_rollout_correction_has_no_gradient_and_no_say_outside_the_mask():
    old = torch.tensor([[0.5, 9.0]], requires_grad=True)
    weights = rollout_correction(
        old, torch.zeros(1, 2), torch.tensor([[True, False]]), level="sequence"
    )
    assert not weights.requires_grad
    assert weights[0].tolist() == pytest.approx([math.exp(0.5), 0.0])


def test_rollout_correction_refuses_nonsense():
    with pytest.raises(ValueError, match=r"rollout_correction\.level: unknown 'word'"):
        correction([0.0], level="word")
    with pytest.raises(ValueError, match=r"mask_below: 2.0 is not below mask_above 0.5"):
        correction([0.0], level="token", mask_below=2.0, mask_above=0.5)
