"""Objectives, aggregation, KL: golden numbers, the case table of PPO, where gradient flows."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import get_advantage_estimator
from rlsys.algorithms.entropy import entropy_rewards, tuned_temperature
from rlsys.algorithms.kl import adapted_coefficient, kl_estimate
from rlsys.algorithms.loss_aggregation import AGGREGATION_MODES, aggregate_loss
from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    available_ratios,
    available_weights,
    check_objective,
    effective_sample_size,
    gradient_coefficient,
    levels_of,
    policy_objective,
    rollout_correction,
)
from rlsys.algorithms.policy_objectives.weights import adaptive_power_of
from rlsys.config.presets import PRESETS
from rlsys.registry import check_parameters

# Every weight with every ratio level that it is defined for.
COMBINATIONS = [
    (level, weight)
    for weight in available_weights()
    for level in levels_of(weight) or available_ratios()
]


def objective_inputs(
    ratios: list[float], advantages: list[float]
) -> tuple[PolicyObjectiveInputs, Tensor]:
    """One response with the given token ratios, old log-probabilities -1."""
    old = torch.full((1, len(ratios)), -1.0, dtype=torch.float64)
    live = (old + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_()
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    made = PolicyObjectiveInputs(
        logprobs=live,
        old_logprobs=old,
        advantages=torch.tensor([advantages], dtype=torch.float64),
        response_mask=mask,
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
            "minimum",  # A > 0: min(rho, sqrt(rho)); A < 0: the larger one; rho d/drho sqrt(rho) = sqrt(rho) / 2
            {"functions": [{"kind": "ratio"}, {"kind": "power", "q": 0.5}]},
            ([0.5, 1.0, 1.5**0.5 / 2, 1.0], [0.5**0.5 / 2, 1.0, 1.5, 4.0]),
        ),
        (
            "minimum",  # A > 0: min(rho, 1); A < 0: max(rho, 1)
            {"functions": [{"kind": "ratio"}, {"kind": "one"}]},
            ([0.5, 1.0, 0.0, 0.0], [0.0, 1.0, 1.5, 4.0]),
        ),
        (
            "minimum",  # slope 1/2 from (1/2, 3/4) on to (2, 3/2), flat after: rho f' = 0.25, 0.5, 0.75, 0; the point itself belongs to the left piece
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


@pytest.mark.parametrize(
    ("level", "weight"), [pair for pair in COMBINATIONS if pair[1] != "reward_time"]
)
def test_the_gradient_of_an_objective_is_its_coefficient(level: str, weight: str):
    """d loss / d log pi_t = -w(rho_t, A_t) A_t, whatever the ratio level, at ratios on both sides of every edge."""
    made, live = objective_inputs([0.3, 1.9, 1.1, 0.8, 5.0], [1.0, 2.0, -1.0, -0.5, -1.5])
    out = policy_objective(made, ratio=level, weight=weight)
    out.token_losses.sum().backward()
    assert live.grad is not None
    coefficient = gradient_coefficient(weight, out.metrics["ratio"].log(), made.advantages)
    assert torch.allclose(live.grad, -coefficient * made.advantages, atol=1e-9)


def test_minimum_of_ratio_and_clip_is_ppo_clip():
    """Values, gradients and what counts as clipped, at ratios on both sides of each edge."""
    ratios, advantages = [0.3, 1.9, 1.1, 0.8, 5.0, 0.1], [1.0, 2.0, -1.0, -0.5, -1.5, -2.0]
    results = []
    for weight in ("minimum", "ppo_clip"):
        made, live = objective_inputs(ratios, advantages)
        out = policy_objective(made, ratio="token", weight=weight)
        out.token_losses.sum().backward()
        assert live.grad is not None
        results.append((out.token_losses, out.metrics["clipped"], live.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([], r"\[\] is not a list of functions"),
        ([{"q": 0.5}], "has no kind. Choose from clip, one, power, ratio, table"),
        ([{"kind": "powr"}], "Did you mean power"),
        ([{"kind": "power", "p": 1}], "power_curve has no such parameter"),
        ([{"kind": "power", "q": 2.0}], "leaves the band between min"),
        ([{"kind": "power", "q": -0.5}], "leaves the band"),
        ([{"kind": "clip", "low": -0.1}], "leaves the band"),
        ([{"kind": "ratio"}, {"kind": "clip", "high": -0.1}], "leaves the band"),
        (
            [{"kind": "table", "ratios_at": [1.0, 2.0, 3.0], "values": [1.0, 1.9, 1.5]}],
            "falls at rho",
        ),
        ([{"kind": "table", "ratios_at": [2.0, 1.0], "values": [1.0, 1.0]}], "ascending"),
        ([{"kind": "one"}], "none of them has a gradient at rho = 1"),
        ([{"kind": "one"}, {"kind": "ratio"}], "List another one first"),
    ],
)
def test_the_general_family_refuses_what_lies_outside_it(functions: list, message: str):
    with pytest.raises(ValueError, match=message) as error:
        check_objective("token", "minimum", {"functions": functions})
    assert "algorithm.objective.parameters.functions" in str(error.value)


def test_reward_time_golden():
    # token ratios 2, 1/2, 3, prefix products 2, 1, 3; A (3, 2, 2) = rewards (1, 0, 2) to go:
    # C = (2 * 1 + 1 * 0 + 3 * 2, 1 * 0 + 3 * 2, 3 * 2) = (8, 6, 6)
    made, live = objective_inputs([2.0, 0.5, 3.0], [3.0, 2.0, 2.0])
    policy_objective(made, ratio="prefix", weight="reward_time").token_losses.sum().backward()
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([-8.0, -6.0, -6.0])


def test_reward_time_skips_tokens_outside_the_mask():
    """A tool's token in the middle takes no reward and no ratio: the same coefficients as without it."""
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


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [19.0, 30.0, 200.0, -30.0])
def test_beyond_the_cap_a_token_keeps_its_gradient_or_counts_as_clipped(
    log_ratio: float, sign: float
):
    """The value of rho is capped at e^+-20, its gradient is not cut: only a weight cuts, and says so."""
    for weight in ("importance", "ppo_clip", "dual_clip", "minimum"):
        live = torch.tensor([[log_ratio - 1]], dtype=torch.float64, requires_grad=True)
        made = PolicyObjectiveInputs(
            logprobs=live,
            old_logprobs=torch.tensor([[-1.0]], dtype=torch.float64),
            advantages=torch.tensor([[sign]], dtype=torch.float64),
            response_mask=torch.ones(1, 1, dtype=torch.bool),
        )
        out = policy_objective(made, ratio="token", weight=weight)
        out.token_losses.sum().backward()
        assert live.grad is not None
        capped = math.exp(min(max(log_ratio, -20.0), 20.0))
        clipped = bool(out.metrics["clipped"].item())
        assert live.grad.item() == pytest.approx(0.0 if clipped else -sign * capped)
        assert clipped == (live.grad.item() == 0.0)


def test_sapo_value_golden():
    # rho 1: 4/tau sigmoid(0) A = 2 A / tau
    made, _ = objective_inputs([1.0, 1.0], [1.0, -1.0])
    out = policy_objective(made, ratio="token", weight="sapo", tau_pos=2.0, tau_neg=4.0)
    assert out.token_losses[0].tolist() == pytest.approx([-1.0, 0.5])


def test_effective_sample_size_golden():
    # weights 1, 1, 2: 4^2 / (3 * 6); equal weights 1; one weight that dwarfs the others 1/n, also beyond what exp can hold
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
    # log-normal ratios of width s: ESS(q) = exp(-q^2 s^2), so q = sqrt(-ln target) / s, here within the sample's noise
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


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_what_exists(name: str):
    preset = PRESETS[name].algorithm
    check_objective(preset.objective.ratio, preset.objective.weight, preset.objective.parameters)
    check_parameters(
        get_advantage_estimator(preset.advantage.name), preset.advantage.parameters, field=""
    )
    made, live = objective_inputs([1.0, 1.0], [1.0, -1.0])
    objective = preset.objective
    policy_objective(
        made, ratio=objective.ratio, weight=objective.weight, **objective.parameters
    ).token_losses.sum().backward()
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([-1.0, 1.0])  # on-policy, each is REINFORCE


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


@pytest.mark.parametrize(("level", "weight"), COMBINATIONS)
def test_on_policy_every_objective_has_the_gradient_of_reinforce(level: str, weight: str):
    made, live = objective_inputs([1.0, 1.0, 1.0], [0.5, -2.0, 1.0])
    policy_objective(made, ratio=level, weight=weight).token_losses.sum().backward()
    assert live.grad is not None
    assert live.grad[0].tolist() == pytest.approx([-0.5, 2.0, -1.0])


@pytest.mark.parametrize(("level", "weight"), COMBINATIONS)
def test_gradient_flows_through_the_live_policy_alone_and_not_outside_the_mask(
    level: str, weight: str
):
    logprobs, old, advantages = (
        torch.randn(2, 4, generator=torch.Generator().manual_seed(i)).requires_grad_()
        for i in range(3)
    )
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    made = PolicyObjectiveInputs(
        logprobs=logprobs, old_logprobs=old, advantages=advantages, response_mask=mask
    )
    out = policy_objective(made, ratio=level, weight=weight)
    out.token_losses.sum().backward()
    assert old.grad is None
    assert advantages.grad is None
    assert logprobs.grad is not None
    assert (logprobs.grad[~mask] == 0).all()
    assert (out.token_losses[~mask] == 0).all()


@pytest.mark.parametrize(("level", "weight"), COMBINATIONS)
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
            logprobs=values,
            old_logprobs=made.old_logprobs,
            advantages=made.advantages,
            response_mask=made.response_mask,
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
    """Enumerated over a categorical policy: k2 and k3_k2 have the gradient of KL(policy || ref), k3 that of KL(ref || policy)."""
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
    """Samples of q = N(0, 1) against p = N(0.1, 1) and N(1, 1), true KL 0.005 and 0.5: bias and standard deviation over the true KL as he prints them.

    His figures: bias 0, 0.002, 0 and 0, 0.25, 0; deviations 20, 1.42, 1.42 and 2, 1.73, 1.7. Of 4 million samples; tolerances 5
    standard errors, and a tenth on deviations.
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
    """Samples of q = N(0, 1), reference N(0.1, 1): KL(ref || q) = 0.005 as well; k1 and k3 are unbiased, within 5 standard errors."""
    n = 1_000_000
    x = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for kind in ("k1", "k3"):
        estimate = kl_estimate(-(x**2) / 2, -((x - 0.1) ** 2) / 2, kind, direction="forward")
        assert float(estimate.mean()) == pytest.approx(
            0.005, abs=5 * float(estimate.std()) / n**0.5
        )


def test_adapted_coefficient_golden():
    # KL twice the target: the error 1 is clipped to 0.2, over a horizon of 10 steps: times 1.02; half: times 0.98; on target: unchanged
    assert adapted_coefficient(0.1, 2.0, target=1.0, horizon=10) == pytest.approx(0.102)
    assert adapted_coefficient(0.1, 0.5, target=1.0, horizon=10) == pytest.approx(0.098)
    assert adapted_coefficient(0.1, 1.0, target=1.0, horizon=10) == 0.1


def test_entropy_rewards_and_temperature_golden():
    mask = torch.tensor([[True, False]])
    assert entropy_rewards(torch.tensor([[-2.0, -9.0]]), mask, 0.1).tolist() == [
        [pytest.approx(0.2), 0.0]
    ]
    # entropy 0.5 below the target of 1: log alpha grows by 0.1 * 0.5
    assert tuned_temperature(0.2, 0.5, target=1.0, learning_rate=0.1) == pytest.approx(
        0.2 * math.exp(0.05)
    )


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
