"""Metrics of an update from all ranks, merged as the group merges them."""

from __future__ import annotations

import pytest
import torch

from rlsys.metrics import combine, values
from workers.training.losses import PackLoss
from workers.training.optimizer_steps import UpdateCounts
from workers.training.update_metrics import loss_metrics

NAMES = ("entropy", "ratio", "ratio_square", "clipped", "difference")


def pack(loss: float, difference: float = 0.0) -> PackLoss:
    """Return the loss of a pack, whose log-probs differ from the engine's by `difference`."""
    sums = {**dict.fromkeys(NAMES, 1.0), "difference": difference}
    maxima = {"ratio": 1.0, "difference": difference}
    return PackLoss(loss=torch.tensor(loss), sums=sums, maxima=maxima)


def test_the_loss_is_the_sum_over_packs_and_ranks_and_the_mean_over_mini_batches():
    """Merge two mini-batches of two ranks to (6 + 4) / 2.

    The first has losses 1 + 2 on rank 0 and 3 on rank 1, the second 4 on rank 0 and no pack on
    rank 1.
    """
    first = [
        loss_metrics([pack(1.0), pack(2.0)], 6, 2, drifted=False),
        loss_metrics([pack(4.0)], 2, 2, drifted=True),
    ]
    second = [
        loss_metrics([pack(3.0)], 1, 2, drifted=False),
        loss_metrics([], 0, 2, drifted=True),
    ]
    merged = values(combine([combine(first), combine(second)]))
    assert merged["policy/loss"] == pytest.approx(5.0)
    assert merged["policy/tokens"] == 9
    assert merged["policy/entropy"] == pytest.approx(4 / 9)  # 1 per pack, over all tokens


def test_a_difference_after_an_update_is_drift():
    reports = [
        loss_metrics([pack(0.0, difference=0.2)], 2, 1, drifted=False),
        loss_metrics([pack(0.0, difference=3.0)], 2, 1, drifted=True),
    ]
    merged = values(combine(reports))
    assert merged["policy/logprob_difference_mean"] == pytest.approx(0.1)
    assert merged["policy/logprob_difference_max"] == pytest.approx(0.2)
    assert merged["policy/drift_mean"] == pytest.approx(1.5)
    assert merged["policy/drift_max"] == 3


def test_updates_are_counted_by_their_outcome():
    counts = UpdateCounts(empty=2).after(finite=True).after(finite=False).after(finite=True)
    assert values(counts.metrics("policy")) == {
        "policy/updates": 2,
        "policy/skipped_updates": 3,
        "policy/nonfinite_gradients": 1,
    }
