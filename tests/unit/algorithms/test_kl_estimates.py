"""Estimates of the KL: golden values, gradients, Schulman's experiment."""

import math

import pytest
import torch

from rlsys.algorithms.kl import adapted_coefficient, kl_estimate


def test_kl_golden():
    # d = log 2: k1 = d, k2 = d^2 / 2, k3 = 1/2 - 1 + d
    d = math.log(2.0)
    live, ref = torch.tensor([d], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert kl_estimate(live, ref, "k1").item() == pytest.approx(d)
    assert kl_estimate(live, ref, "k2").item() == pytest.approx(d * d / 2)
    assert kl_estimate(live, ref, "k3").item() == pytest.approx(d - 0.5)


def test_forward_kl_golden():
    # d = log 2, r = 1/2: k1 = -r d, k2 = r d^2 / 2, k3 = 1 - r - r d
    d = math.log(2.0)
    live, ref = torch.tensor([d], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert kl_estimate(live, ref, "k1", direction="forward").item() == pytest.approx(-d / 2)
    assert kl_estimate(live, ref, "k2", direction="forward").item() == pytest.approx(d * d / 4)
    assert kl_estimate(live, ref, "k3", direction="forward").item() == pytest.approx(0.5 - d / 2)


def test_k3_k2_has_the_value_of_one_and_the_gradient_of_the_other():
    live = torch.tensor([0.7, -0.3], dtype=torch.float64, requires_grad=True)
    ref = torch.zeros(2, dtype=torch.float64)
    estimate = kl_estimate(live, ref, "k3_k2")
    assert torch.equal(estimate, kl_estimate(live, ref, "k3"))
    estimate.sum().backward()
    assert live.grad is not None
    assert live.grad.tolist() == pytest.approx([0.7, -0.3])  # d/dx x^2/2 = x
    with pytest.raises(ValueError, match=r"kl\.kind: 'k3_k2' has the gradient of the reverse k2"):
        kl_estimate(live, ref, "k3_k2", direction="forward")


@pytest.mark.parametrize(
    ("kind", "direction", "divergence"),
    [
        ("k2", "reverse", "reverse"),
        ("k3_k2", "reverse", "reverse"),
        ("k3", "reverse", "forward"),
        ("k3", "forward", None),
    ],
)
def test_expected_gradients_of_kl_losses(kind: str, direction: str, divergence: str | None):
    """k2 and k3_k2 have the gradient of KL(policy || ref), k3 that of KL(ref || policy).

    Enumerated over a categorical policy.
    """
    logits = torch.tensor([0.3, -1.0, 0.9], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.4, 0.2, 0.5], dtype=torch.float64).log_softmax(0)
    logs = logits.log_softmax(0)
    (found,) = torch.autograd.grad(
        (logs.exp().detach() * kl_estimate(logs, ref, kind, direction=direction)).sum(), logits
    )
    reverse = torch.autograd.grad(
        (logits.log_softmax(0).exp() * (logits.log_softmax(0) - ref)).sum(), logits
    )[0]
    forward = torch.autograd.grad((ref.exp() * (ref - logits.log_softmax(0))).sum(), logits)[0]
    if divergence is None:  # only the value is an estimate
        value = (logs.exp() * kl_estimate(logs, ref, kind, direction=direction)).sum()
        assert value.item() == pytest.approx((ref.exp() * (ref - logs)).sum().item())
    else:
        assert torch.allclose(found, reverse if divergence == "reverse" else forward, atol=1e-12)
        assert not torch.allclose(reverse, forward, atol=1e-3)


def test_schulmans_experiment():
    """Bias and standard deviation over the true KL are those that Schulman printed.

    Samples are of q = N(0, 1) against p = N(0.1, 1) and N(1, 1), true KL 0.005 and 0.5.

    His figures: bias 0, 0.002, 0 and 0, 0.25, 0; deviations 20, 1.42, 1.42 and 2, 1.73, 1.7. Of 4
    million samples; tolerances 5 standard errors, and a tenth on deviations.
    """
    n = 4_000_000
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = {
        0.1: {"k1": (0.0, 20.0), "k2": (0.002, 1.42), "k3": (0.0, 1.42)},
        1.0: {"k1": (0.0, 2.0), "k2": (0.25, 1.73), "k3": (0.0, 1.7)},
    }
    for mean, rows in table.items():
        true = mean**2 / 2
        for kind, (bias, deviation) in rows.items():
            estimate = kl_estimate(-(x**2) / 2, -((x - mean) ** 2) / 2, kind)
            relative = float(estimate.std()) / true
            assert float(estimate.mean()) / true - 1 == pytest.approx(
                bias, abs=5 * relative / n**0.5 + 0.002
            )
            assert relative == pytest.approx(deviation, rel=0.1)
        # k3's sign is what makes it popular
        assert (kl_estimate(-(x**2) / 2, -((x - mean) ** 2) / 2, "k3") >= 0).all()


def test_forward_estimators_on_gaussians():
    """k1 and k3 are unbiased, within 5 standard errors.

    Samples are of q = N(0, 1), the reference is N(0.1, 1): KL(ref || q) = 0.005 as well.
    """
    n = 1_000_000
    x = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for kind in ("k1", "k3"):
        estimate = kl_estimate(-(x**2) / 2, -((x - 0.1) ** 2) / 2, kind, direction="forward")
        assert float(estimate.mean()) == pytest.approx(
            0.005, abs=5 * float(estimate.std()) / n**0.5
        )


def test_adapted_coefficient_golden():
    # KL twice the target: the error 1 is clipped to 0.2, over a horizon of 10 steps: times 1.02;
    # half: times 0.98; on target: unchanged
    assert adapted_coefficient(0.1, 2.0, target=1.0, horizon=10) == pytest.approx(0.102)
    assert adapted_coefficient(0.1, 0.5, target=1.0, horizon=10) == pytest.approx(0.098)
    assert adapted_coefficient(0.1, 1.0, target=1.0, horizon=10) == 0.1
