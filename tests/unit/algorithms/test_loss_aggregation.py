"""Aggregation of token losses to one number."""

import pytest
import torch

from rlsys.algorithms.loss_aggregation import AGGREGATION_MODES, aggregate_loss


def test_aggregation_golden():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # sums: 6 over 3 tokens, 4 over 1 token
    assert aggregate_loss(losses, mask, "token_mean").item() == pytest.approx(10 / 4)
    assert aggregate_loss(losses, mask, "sequence_mean").item() == pytest.approx((2 + 4) / 2)
    assert aggregate_loss(losses, mask, "sequence_sum").item() == pytest.approx(10 / 2)
    assert aggregate_loss(losses, mask, "constant", max_tokens=5).item() == pytest.approx(
        10 / (2 * 5)
    )


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_losses_of_parts_add_up_to_the_loss_of_the_whole(mode: str):
    losses = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    sizes = {"num_tokens": float(mask.sum()), "num_sequences": 6.0, "max_tokens": 5}
    parts = [
        aggregate_loss(losses[i], mask[i], mode, **sizes)
        for i in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert torch.stack(parts).sum().item() == pytest.approx(
        aggregate_loss(losses, mask, mode, **sizes).item(), rel=1e-5
    )


def test_an_empty_response_contributes_nothing():
    mask = torch.tensor([[True], [False]])
    assert aggregate_loss(
        torch.tensor([[2.0], [float("nan")]]), mask, "sequence_mean"
    ).item() == pytest.approx(1.0)


def test_constant_needs_max_tokens_and_modes_are_known():
    with pytest.raises(ValueError, match="needs max_tokens"):
        aggregate_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "constant")
    with pytest.raises(ValueError, match="unknown mode 'mean'"):
        aggregate_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "mean")
