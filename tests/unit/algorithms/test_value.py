"""The loss of a value function and its explained variance, against numbers by hand."""

import math

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.value import explained_variance, value_is_clipped, value_loss


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def test_squared_error_by_hand():
    """1/2 (0.5 - 1)^2 = 0.125 and 1/2 (2 - (-1))^2 = 4.5."""
    loss = value_loss(row(0.5, 2), row(0, 0), row(1, -1))
    torch.testing.assert_close(loss, row(0.125, 4.5))


def test_clipped_error_by_hand():
    """Clip 0.2 around the old values 0:

    V 1,   R 1:  V_clip 0.2,  max(0, 0.64) / 2 = 0.32      moved to the target: clipped
    V 1,   R 0:  V_clip 0.2,  max(1, 0.04) / 2 = 0.5       moved away from it: not clipped
    V 0.1, R 1:  V_clip 0.1,  max(0.81, 0.81) / 2 = 0.405  inside of the range
    V -1,  R -3: V_clip -0.2, max(4, 7.84) / 2 = 3.92      below: clipped
    """
    values = row(1, 1, 0.1, -1).requires_grad_()
    returns = row(1, 0, 1, -3)
    loss = value_loss(values, row(0, 0, 0, 0), returns, clip=0.2)
    torch.testing.assert_close(loss.detach(), row(0.32, 0.5, 0.405, 3.92))

    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, row(0, 1, -0.9, 0))
    clipped = value_is_clipped(values, row(0, 0, 0, 0), returns, clip=0.2)
    assert clipped.tolist() == [[True, False, False, True]]
    assert not value_is_clipped(values, row(0, 0, 0, 0), returns).any()


@pytest.mark.parametrize("clip", [None, 0.3])
def test_against_a_loop_over_tokens(clip: float | None):
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    loss = value_loss(values, old, returns, clip=clip)
    for i in range(5):
        for t in range(7):
            v, o, r = float(values[i, t]), float(old[i, t]), float(returns[i, t])
            expected = (v - r) ** 2 / 2
            if clip is not None:
                near = min(max(v, o - clip), o + clip)
                expected = max(expected, (near - r) ** 2 / 2)
            assert float(loss[i, t]) == pytest.approx(expected, abs=1e-12)


def test_before_the_first_update_the_clip_changes_nothing():
    old = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    values = old.clone().requires_grad_()
    returns = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    gradients = [
        torch.autograd.grad(value_loss(values, old, returns, clip=clip).sum(), values)[0]
        for clip in (None, 0.2)
    ]
    torch.testing.assert_close(gradients[0], (old - returns))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_inside_the_range_nothing_is_clipped_by_rounding():
    generator = torch.Generator().manual_seed(4)
    old, returns = torch.randn(2, 100, 50, generator=generator)
    values = old + 0.19 * (2 * torch.rand(100, 50, generator=generator) - 1)
    assert not value_is_clipped(values, old, returns, clip=0.2).any()
    assert torch.equal(value_loss(values, old, returns, clip=0.2), value_loss(values, old, returns))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_old_values_and_returns_get_no_gradient(clip: float | None):
    values, old, returns = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    value_loss(values, old, returns, clip=clip).sum().backward()
    assert values.grad is not None
    assert old.grad is None
    assert returns.grad is None


def test_half_precision_is_computed_in_float32():
    values = torch.full((1, 1), 1.0, dtype=torch.bfloat16)
    loss = value_loss(values, values, torch.tensor([[1.001]]))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(0.5e-6, rel=1e-3)


def test_the_token_mean_does_not_depend_on_the_split():
    """Sum over parts with the size of the whole."""
    generator = torch.Generator().manual_seed(3)
    values, old, returns = torch.randn(3, 6, 4, generator=generator)
    mask = torch.rand(6, 4, generator=generator) < 0.7
    loss = value_loss(values, old, returns, clip=0.5)
    sizes = {"num_tokens": int(mask.sum())}
    whole = aggregate_loss(loss, mask, "token_mean", **sizes)
    parts = [aggregate_loss(loss[i::3], mask[i::3], "token_mean", **sizes) for i in range(3)]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="clip: 0 is not above 0"):
        value_loss(row(1), row(1), row(1), clip=0)
    with pytest.raises(ValueError, match="must have one shape"):
        value_loss(row(1), row(1), row(1, 2))
    with pytest.raises(ValueError, match="must have one shape"):
        explained_variance(row(1), row(1), torch.ones(1, 2, dtype=torch.bool))


def test_explained_variance_by_hand():
    """Returns (0, 1), values (0, 0.5): 1 - (1/16) / (1/4) = 3/4; the masked token is left out."""
    mask = torch.tensor([[True, True, False]])
    assert explained_variance(row(0, 0.5, 9), row(0, 1, -9), mask) == pytest.approx(0.75)


def test_explained_variance_of_perfect_constant_and_opposite_values():
    mask = torch.ones(1, 4, dtype=torch.bool)
    returns = row(0, 1, 2, 5)
    assert explained_variance(returns + 3, returns, mask) == pytest.approx(1)
    assert explained_variance(row(7, 7, 7, 7), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)  # 1 - 2^2


def test_explained_variance_of_equal_returns_is_not_a_number():
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert math.isnan(explained_variance(row(0, 1), row(1, 1), mask))
    assert math.isnan(explained_variance(row(0, 1), row(0, 1), torch.zeros_like(mask)))
