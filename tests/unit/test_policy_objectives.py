"""Objectives, aggregation, KL: golden numbers, the case table of PPO, where gradient flows."""

import math

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.kl import kl_estimate
from rlsys.algorithms.loss_aggregation import AGGREGATION_MODES, aggregate_loss
from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    available_ratios,
    available_weights,
    check_objective,
    policy_objective,
)


def objective_inputs(ratios: list[float], advantages: list[float]) -> tuple[PolicyObjectiveInputs, Tensor]:
    """One response with the given token ratios, old log-probabilities -1."""
    old = torch.full((1, len(ratios)), -1.0, dtype=torch.float64)
    live = (old + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_()
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    made = PolicyObjectiveInputs(
        logprobs=live, old_logprobs=old, advantages=torch.tensor([advantages], dtype=torch.float64), response_mask=mask
    )
    return made, live


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "gradient"),
    [
        (1.0, 2.0, 2.0, 2.0),  # inside the band: rho A, gradient rho A
        (1.5, 2.0, 2.4, 0.0),  # above, A > 0: clipped at 1.2 A, no gradient
        (0.5, 2.0, 1.0, 1.0),  # below, A > 0: rho A keeps pulling back
        (1.5, -2.0, -3.0, -3.0),  # above, A < 0: rho A keeps pulling back
        (0.5, -2.0, -1.6, 0.0),  # below, A < 0: clipped at 0.8 A, no gradient
    ],
)
def test_case_table_of_ppo(ratio: float, advantage: float, surrogate: float, gradient: float):
    made, live = objective_inputs([ratio], [advantage])
    out = policy_objective(made, ratio="token", weight="ppo_clip", clip_low=0.2, clip_high=0.2)
    out.token_losses.sum().backward()
    assert live.grad is not None
    assert out.token_losses.item() == pytest.approx(-surrogate)
    assert live.grad.item() == pytest.approx(-gradient)  # d rho / d log pi = rho
    assert out.metrics["clipped"].item() == float(gradient == 0.0)


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    made, live = objective_inputs([10.0], [-1.0])
    out = policy_objective(made, ratio="token", weight="dual_clip", clip_c=3.0)
    out.token_losses.sum().backward()
    assert live.grad is not None
    assert out.token_losses.item() == pytest.approx(3.0)  # max(-10, 3 * -1) = -3
    assert live.grad.item() == 0.0


def test_cispo_keeps_a_bounded_gradient():
    made, live = objective_inputs([2.0], [1.5])
    policy_objective(made, ratio="token", weight="cispo", clip_high=0.2).token_losses.sum().backward()
    assert live.grad is not None
    assert live.grad.item() == pytest.approx(-1.2 * 1.5)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [2.0, 0.5, 4.0]),
        ("sequence", [4 ** (1 / 3)] * 3),  # product 4, geometric mean over 3
        ("future", [4 ** (1 / 3), 2 ** (1 / 2), 4.0]),
        ("prefix", [2.0, 1.0, 4.0]),
        ("product", [4.0] * 3),
    ],
)
def test_ratio_levels_golden(level: str, expected: list[float]):
    made, _ = objective_inputs([2.0, 0.5, 4.0], [1.0, 1.0, 1.0])
    out = policy_objective(made, ratio=level, weight="importance")
    assert out.metrics["ratio"][0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("weight", available_weights())
@pytest.mark.parametrize("level", available_ratios())
def test_on_policy_every_objective_has_the_gradient_of_reinforce(level: str, weight: str):
    made, live = objective_inputs([1.0, 1.0, 1.0], [0.5, -2.0, 1.0])
    policy_objective(made, ratio=level, weight=weight).token_losses.sum().backward()
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([-0.5, 2.0, -1.0])


@pytest.mark.parametrize("weight", available_weights())
@pytest.mark.parametrize("level", available_ratios())
def test_gradient_flows_through_the_live_policy_alone_and_not_outside_the_mask(level: str, weight: str):
    logprobs, old, advantages = (torch.randn(2, 4, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    made = PolicyObjectiveInputs(logprobs=logprobs, old_logprobs=old, advantages=advantages, response_mask=mask)
    out = policy_objective(made, ratio=level, weight=weight)
    out.token_losses.sum().backward()
    assert old.grad is None
    assert advantages.grad is None
    assert logprobs.grad is not None
    assert (logprobs.grad[~mask] == 0).all()
    assert (out.token_losses[~mask] == 0).all()


@pytest.mark.parametrize("weight", available_weights())
@pytest.mark.parametrize("level", available_ratios())
def test_log_ratios_of_80_stay_finite(level: str, weight: str):
    live = torch.tensor([[0.0, -80.0]], requires_grad=True)
    made = PolicyObjectiveInputs(
        logprobs=live,
        old_logprobs=torch.tensor([[-80.0, 0.0]]),
        advantages=torch.tensor([[1.0, -1.0]]),
        response_mask=torch.ones(1, 2, dtype=torch.bool),
    )
    loss = policy_objective(made, ratio=level, weight=weight).token_losses
    loss.sum().backward()
    assert live.grad is not None
    assert loss.isfinite().all()
    assert live.grad.isfinite().all()


def test_finite_differences_of_ppo_clip():
    made, live = objective_inputs([1.1, 0.7, 1.4], [1.0, 1.0, -0.5])

    def loss(values: Tensor) -> Tensor:
        inputs = PolicyObjectiveInputs(
            logprobs=values, old_logprobs=made.old_logprobs, advantages=made.advantages, response_mask=made.response_mask
        )
        return policy_objective(inputs, ratio="token", weight="ppo_clip").token_losses

    assert torch.autograd.gradcheck(loss, (live,))


def test_aggregation_golden():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # sums: 6 over 3 tokens, 4 over 1 token
    assert aggregate_loss(losses, mask, "token_mean").item() == pytest.approx(10 / 4)
    assert aggregate_loss(losses, mask, "sequence_mean").item() == pytest.approx((2 + 4) / 2)
    assert aggregate_loss(losses, mask, "sequence_sum").item() == pytest.approx(10 / 2)
    assert aggregate_loss(losses, mask, "constant", max_tokens=5).item() == pytest.approx(10 / (2 * 5))


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_losses_of_parts_add_up_to_the_loss_of_the_whole(mode: str):
    losses = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    sizes = {"num_tokens": float(mask.sum()), "num_sequences": 6.0, "max_tokens": 5}
    parts = [aggregate_loss(losses[i], mask[i], mode, **sizes) for i in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert torch.stack(parts).sum().item() == pytest.approx(aggregate_loss(losses, mask, mode, **sizes).item(), rel=1e-5)


def test_an_empty_response_contributes_nothing():
    mask = torch.tensor([[True], [False]])
    assert aggregate_loss(torch.tensor([[2.0], [float("nan")]]), mask, "sequence_mean").item() == pytest.approx(1.0)


def test_constant_needs_max_tokens_and_modes_are_known():
    with pytest.raises(ValueError, match="needs max_tokens"):
        aggregate_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "constant")
    with pytest.raises(ValueError, match="unknown mode 'mean'"):
        aggregate_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "mean")


def test_kl_golden():
    # d = log 2: k1 = d, k2 = d^2 / 2, k3 = 1/2 - 1 + d
    d = math.log(2.0)
    live, ref = torch.tensor([d], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert kl_estimate(live, ref, "k1").item() == pytest.approx(d)
    assert kl_estimate(live, ref, "k2").item() == pytest.approx(d * d / 2)
    assert kl_estimate(live, ref, "k3").item() == pytest.approx(d - 0.5)


@pytest.mark.parametrize(("mean", "true_kl"), [(0.1, 0.005), (1.0, 0.5)])
def test_schulmans_experiment(mean: float, true_kl: float):
    """Samples of q = N(mean, 1) against p = N(0, 1): KL(q, p) = mean^2 / 2. Tolerance 5 standard errors: one false alarm in a million."""
    n = 1_000_000
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + mean
    logq, logp = -((x - mean) ** 2) / 2, -(x**2) / 2
    for kind in ("k1", "k3"):
        estimate = kl_estimate(logq, logp, kind)
        assert estimate.mean().item() == pytest.approx(true_kl, abs=5 * estimate.std().item() / n**0.5)
    # k2 is biased: E[d^2]/2 with d = mean x - mean^2/2 is (mean^2 + mean^4 / 4) / 2
    k2 = kl_estimate(logq, logp, "k2")
    assert k2.mean().item() == pytest.approx((mean**2 + mean**4 / 4) / 2, abs=5 * k2.std().item() / n**0.5)
    assert (kl_estimate(logq, logp, "k3") >= 0).all()


def test_parameters_are_checked_against_the_signature():
    check_objective("token", "ppo_clip", {"clip_low": 0.1})
    with pytest.raises(ValueError, match=r"algorithm\.objective\.parameters\.clip_hgih: .* Did you mean clip_high"):
        check_objective("token", "ppo_clip", {"clip_hgih": 0.3})
    with pytest.raises(ValueError, match="'a lot' is a str; ppo_clip_weight expects float"):
        check_objective("token", "ppo_clip", {"clip_low": "a lot"})
    with pytest.raises(ValueError, match=r"algorithm\.objective\.ratio: unknown ratio 'tokens'\. Did you mean token"):
        check_objective("tokens", "ppo_clip", {})
