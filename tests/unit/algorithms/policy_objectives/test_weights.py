"""Weight functions: case tables, golden coefficients, gradients."""

import math

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    check_objective,
    effective_sample_size,
    gradient_coefficient,
    policy_objective,
)
from rlsys.algorithms.policy_objectives.weights import adaptive_power_of
from tests.support.objective_examples import objective_inputs


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


@pytest.mark.parametrize(
    ("weight", "parameters", "expected"),
    [
        # at ratios 1/2, 1, 3/2, 4: first for A = +1, then for A = -1
        ("none", {}, ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])),
        ("importance", {}, ([0.5, 1.0, 1.5, 4.0], [0.5, 1.0, 1.5, 4.0])),
        (
            "ppo_clip",
            {"clip_low": 0.2, "clip_high": 0.28},
            ([0.5, 1.0, 0.0, 0.0], [0.0, 1.0, 1.5, 4.0]),
        ),
        (
            "ppo_clip",
            {"clip_low": 0.6, "clip_high": 0.6},
            ([0.5, 1.0, 1.5, 0.0], [0.5, 1.0, 1.5, 4.0]),
        ),
        ("dual_clip", {"clip_c": 3.0}, ([0.5, 1.0, 0.0, 0.0], [0.0, 1.0, 1.5, 0.0])),
        ("upper_clip", {"clip_high": 0.2}, ([0.5, 1.0, 1.2, 1.2], [0.5, 1.0, 1.2, 1.2])),
        ("power", {"q": 0.5}, ([0.5**0.5, 1.0, 1.5**0.5, 2.0], [0.5**0.5, 1.0, 1.5**0.5, 2.0])),
        ("power", {"q": 0.0}, ([1.0] * 4, [1.0] * 4)),
        (
            "adaptive_power",
            {"q": 0.5},
            ([0.5**0.5, 1.0, 1.5**0.5, 2.0], [0.5**0.5, 1.0, 1.5**0.5, 2.0]),
        ),
        (
            "cispo",
            {"clip_low": 0.4, "clip_high": 0.2},
            ([0.6, 1.0, 1.2, 1.2], [0.6, 1.0, 1.2, 1.2]),
        ),
        (
            "sapo",
            {"tau_pos": 1.0, "tau_neg": 2.0},
            tuple(
                [r / math.cosh(tau * (r - 1) / 2) ** 2 for r in (0.5, 1.0, 1.5, 4.0)]
                for tau in (1.0, 2.0)
            ),
        ),
        (
            "sapo_sequence",  # sech^2(tau log(r) / 2) = 4 r^tau / (1 + r^tau)^2
            {"tau_pos": 1.0, "tau_neg": 2.0},
            tuple(
                [r * 4 * r**tau / (1 + r**tau) ** 2 for r in (0.5, 1.0, 1.5, 4.0)]
                for tau in (1.0, 2.0)
            ),
        ),
        ("reward_time", {}, ([0.5, 1.0, 1.5, 4.0], [0.5, 1.0, 1.5, 4.0])),
        ("minimum", {}, ([0.5, 1.0, 0.0, 0.0], [0.0, 1.0, 1.5, 4.0])),  # ppo_clip
        (
            # A > 0: min(rho, sqrt(rho)); A < 0: the larger one;
            # rho d/drho sqrt(rho) = sqrt(rho) / 2
            "minimum",
            {"functions": [{"kind": "ratio"}, {"kind": "power", "q": 0.5}]},
            ([0.5, 1.0, 1.5**0.5 / 2, 1.0], [0.5**0.5 / 2, 1.0, 1.5, 4.0]),
        ),
        (
            "minimum",  # A > 0: min(rho, 1); A < 0: max(rho, 1)
            {"functions": [{"kind": "ratio"}, {"kind": "one"}]},
            ([0.5, 1.0, 0.0, 0.0], [0.0, 1.0, 1.5, 4.0]),
        ),
        (
            # slope 1/2 from (1/2, 3/4) on to (2, 3/2), flat after: rho f' = 0.25, 0.5, 0.75, 0; the
            # point itself belongs to the left piece
            "minimum",
            {"functions": [{"kind": "table", "ratios_at": [0.4, 2.0], "values": [0.7, 1.5]}]},
            ([0.25, 0.5, 0.75, 0.0], [0.25, 0.5, 0.75, 0.0]),
        ),
    ],
)
def test_gradient_coefficients_golden(
    weight: str, parameters: dict, expected: tuple[list[float], list[float]]
):
    logs = torch.tensor([0.5, 1.0, 1.5, 4.0], dtype=torch.float64).log()
    for sign, values in zip((1.0, -1.0), expected, strict=True):
        found = gradient_coefficient(
            weight, logs, torch.full((4,), sign, dtype=torch.float64), **parameters
        )
        assert found.tolist() == pytest.approx(values)


def test_reward_time_golden():
    # token ratios 2, 1/2, 3, prefix products 2, 1, 3; A (3, 2, 2) = rewards (1, 0, 2) to go:
    # C = (2 * 1 + 1 * 0 + 3 * 2, 1 * 0 + 3 * 2, 3 * 2) = (8, 6, 6)
    made, live = objective_inputs([2.0, 0.5, 3.0], [3.0, 2.0, 2.0])
    policy_objective(made, ratio="prefix", weight="reward_time").token_losses.sum().backward()
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([-8.0, -6.0, -6.0])


def test_reward_time_skips_tokens_outside_the_mask():
    """A tool's token has no reward and no ratio: the coefficients are those without it."""
    made, _ = objective_inputs([2.0, 7.0, 0.5, 3.0], [3.0, 9.0, 2.0, 2.0])
    mask = torch.tensor([[True, False, True, True]])
    live = made.logprobs.detach().requires_grad_()
    made = PolicyObjectiveInputs(
        logprobs=live,
        old_logprobs=made.old_logprobs,
        advantages=made.advantages,
        response_mask=mask,
    )
    policy_objective(made, ratio="prefix", weight="reward_time").token_losses.sum().backward()
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([-8.0, 0.0, -6.0, -6.0])


def test_weights_refuse_ratio_levels_that_they_are_not_defined_for():
    message = r"algorithm\.objective\.ratio: 'token' with weight 'reward_time'.*ratio prefix"
    with pytest.raises(ValueError, match=message):
        check_objective("token", "reward_time", {})
    made, _ = objective_inputs([1.0], [1.0])
    with pytest.raises(ValueError, match=message):
        policy_objective(made, ratio="token", weight="reward_time")


def test_sapo_value_golden():
    # rho 1: 4/tau sigmoid(0) A = 2 A / tau
    made, _ = objective_inputs([1.0, 1.0], [1.0, -1.0])
    out = policy_objective(made, ratio="token", weight="sapo", tau_pos=2.0, tau_neg=4.0)
    assert out.token_losses[0].tolist() == pytest.approx([-1.0, 0.5])


def test_effective_sample_size_golden():
    # weights 1, 1, 2: 4^2 / (3 * 6); equal weights 1; one weight that dwarfs the others 1/n, also
    # beyond what exp can hold
    assert float(effective_sample_size(torch.tensor([1.0, 1.0, 2.0]).log())) == pytest.approx(
        16 / 18
    )
    assert float(effective_sample_size(torch.full((5,), -80.0))) == pytest.approx(1.0)
    assert float(effective_sample_size(torch.tensor([800.0, 0.0, 0.0, 0.0]))) == pytest.approx(
        1 / 4
    )


def test_adaptive_power_is_the_largest_that_keeps_the_target():
    logs = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for target in (0.5, 0.9, 0.99):
        q = adaptive_power_of(logs, target_ess=target)["q"]
        assert 0 < q < 1
        assert (
            float(effective_sample_size(q * logs))
            >= target
            > float(effective_sample_size((q + 1e-5) * logs))
        )
    # log-normal ratios of width s: ESS(q) = exp(-q^2 s^2), so q = sqrt(-ln target) / s, here within
    # the sample's noise
    assert adaptive_power_of(logs, target_ess=0.9)["q"] == pytest.approx(
        (-math.log(0.9)) ** 0.5, rel=0.1
    )
    assert adaptive_power_of(0.01 * logs)["q"] == 1.0


def test_adaptive_power_leaves_the_mask_out():
    made = PolicyObjectiveInputs(
        logprobs=torch.tensor([[1.0, -1.0, 50.0, 9.0]]),
        old_logprobs=torch.zeros(1, 4),
        advantages=torch.ones(1, 4),
        response_mask=torch.tensor([[True, True, False, False]]),
    )
    q = adaptive_power_of(torch.tensor([1.0, -1.0]))["q"]
    given = policy_objective(made, ratio="token", weight="power", q=q)
    assert torch.equal(
        policy_objective(made, ratio="token", weight="adaptive_power").token_losses,
        given.token_losses,
    )


def test_finite_differences_of_ppo_clip():
    made, live = objective_inputs([1.1, 0.7, 1.4], [1.0, 1.0, -0.5])

    def loss(values: Tensor) -> Tensor:
        inputs = PolicyObjectiveInputs(
            logprobs=values,
            old_logprobs=made.old_logprobs,
            advantages=made.advantages,
            response_mask=made.response_mask,
        )
        return policy_objective(inputs, ratio="token", weight="ppo_clip").token_losses

    assert torch.autograd.gradcheck(loss, (live,))


def test_parameters_are_checked_against_the_signature():
    check_objective("token", "ppo_clip", {"clip_low": 0.1})
    with pytest.raises(
        ValueError, match=r"algorithm\.objective\.parameters\.clip_hgih: .* Did you mean clip_high"
    ):
        check_objective("token", "ppo_clip", {"clip_hgih": 0.3})
    with pytest.raises(ValueError, match="'a lot' is a str; ppo_clip_weight expects float"):
        check_objective("token", "ppo_clip", {"clip_low": "a lot"})
    with pytest.raises(
        ValueError,
        match=r"algorithm\.objective\.ratio: unknown ratio 'tokens'\. Did you mean token",
    ):
        check_objective("tokens", "ppo_clip", {})
