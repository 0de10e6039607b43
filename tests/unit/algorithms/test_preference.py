"""Direct preference optimization."""

import math

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.preference import dpo_loss


def four(*values: float) -> list[Tensor]:
    """Return one pair: chosen, rejected, reference of chosen, reference of rejected."""
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def test_sigmoid_by_hand():
    # h = (-1 - -2) - (-4 - -3) = 2, beta h = 1, log(1 + e^-1) = 0.313262
    output = dpo_loss(*four(-1, -4, -2, -3), beta=0.5)
    assert float(output.losses) == pytest.approx(0.31326168751822286, abs=1e-12)
    assert float(output.chosen_rewards) == pytest.approx(0.5)  # 0.5 (-1 - -2)
    assert float(output.rejected_rewards) == pytest.approx(-0.5)  # 0.5 (-4 - -3)


def test_label_smoothing_mixes_both_labels():
    # 0.9 * 0.313262 + 0.1 * log(1 + e^1) = 0.9 * 0.313262 + 0.1 * 1.313262
    output = dpo_loss(*four(-1, -4, -2, -3), beta=0.5, label_smoothing=0.1)
    assert float(output.losses) == pytest.approx(0.41326168751822284, abs=1e-12)


def test_ipo_by_hand():
    # (2 - 1 / (2 * 0.25))^2 = 0 and (2 - 1 / (2 * 0.5))^2 = 1
    assert float(dpo_loss(*four(-1, -4, -2, -3), beta=0.25, kind="ipo").losses) == 0
    assert float(dpo_loss(*four(-1, -4, -2, -3), beta=0.5, kind="ipo").losses) == 1


def test_the_policy_gets_the_gradient_and_the_reference_none():
    values = [value.requires_grad_() for value in four(-1, -4, -2, -3)]
    dpo_loss(*values, beta=0.5).losses.sum().backward()
    # -beta sigmoid(-beta h) = -0.5 / (1 + e)
    expected = -0.5 / (1 + math.e)
    assert values[0].grad is not None
    assert values[1].grad is not None
    assert float(values[0].grad) == pytest.approx(expected)
    assert float(values[1].grad) == pytest.approx(-expected)
    assert values[2].grad is None
    assert values[3].grad is None


def test_no_gradient_flows_through_the_implicit_rewards():
    output = dpo_loss(*[value.requires_grad_() for value in four(-1, -4, -2, -3)])
    assert not output.chosen_rewards.requires_grad
    assert not output.rejected_rewards.requires_grad


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_parity_with_a_loop_over_pairs(kind: str):
    rng = torch.Generator().manual_seed(0)
    values = [torch.randn(6, generator=rng, dtype=torch.float64) for _ in range(4)]
    losses = dpo_loss(*values, beta=0.3, kind=kind).losses
    for i in range(6):
        c, r, ref_c, ref_r = (float(value[i]) for value in values)
        h = math.log(math.exp(c) / math.exp(ref_c)) - math.log(math.exp(r) / math.exp(ref_r))
        expected = (h - 1 / 0.6) ** 2 if kind == "ipo" else math.log(1 + math.exp(-0.3 * h))
        assert float(losses[i]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kind": "hinge"}, "objective.kind"),
        ({"beta": 0.0}, "objective.beta"),
        ({"label_smoothing": 0.5}, "objective.label_smoothing"),
        ({"label_smoothing": -0.1}, "objective.label_smoothing"),
        ({"label_smoothing": 0.1, "kind": "ipo"}, "objective.label_smoothing"),
    ],
)
def test_what_is_not_defined_is_refused(options: dict, field: str):
    with pytest.raises(ValueError, match=field):
        dpo_loss(*four(-1, -4, -2, -3), **options)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_optimum_is_the_tilted_reference(beta: float):
    """With exact preference probabilities the minimum is pi_ref exp(r / beta) / Z.

    Every ordered pair of 5 responses counts with its Bradley-Terry probability under the reward r;
    the policy is a table of logits, and Newton's method finds the minimum.
    """
    rng = torch.Generator().manual_seed(1)
    reward = torch.randn(5, generator=rng, dtype=torch.float64)
    reference = torch.randn(5, generator=rng, dtype=torch.float64).log_softmax(0)
    places = torch.arange(5)
    first, second = places.repeat_interleave(5), places.repeat(5)
    probability = torch.sigmoid(reward[first] - reward[second])

    def expected_loss(free: Tensor) -> Tensor:
        logits = torch.cat([free, free.new_zeros(1)])  # the last one only sets the level
        policy = logits.log_softmax(0)
        output = dpo_loss(
            policy[first], policy[second], reference[first], reference[second], beta=beta
        )
        return (probability * output.losses).sum()

    free = torch.zeros(4, dtype=torch.float64)
    for _ in range(50):
        hessian = torch.autograd.functional.hessian(expected_loss, free)
        gradient = torch.autograd.functional.jacobian(expected_loss, free)
        assert isinstance(hessian, Tensor)
        assert isinstance(gradient, Tensor)
        step = torch.linalg.solve(hessian, gradient)
        free = free - step.clamp(-1, 1)

    found = torch.cat([free, free.new_zeros(1)]).softmax(0)
    expected = (reference + reward / beta).softmax(0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
