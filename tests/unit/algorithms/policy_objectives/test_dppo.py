"""DPPO: which tokens are outside the region, the capped weight, and exact divergences."""

from __future__ import annotations

import math

import pytest
import torch

from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    check_objective,
    policy_objective,
)


def coefficient(
    weight: str, live: float, old: float, advantage: float, **parameters: float
) -> float:
    """Return d surrogate / d log pi / A of one token with these probabilities."""
    logprobs = torch.tensor([[live]], dtype=torch.float64).log().requires_grad_()
    made = PolicyObjectiveInputs(
        logprobs=logprobs,
        old_logprobs=torch.tensor([[old]], dtype=torch.float64).log(),
        advantages=torch.tensor([[advantage]], dtype=torch.float64),
        response_mask=torch.ones(1, 1, dtype=torch.bool),
    )
    out = policy_objective(made, ratio="token", weight=weight, **parameters)
    out.token_losses.sum().backward()
    assert logprobs.grad is not None
    found = -float(logprobs.grad) / advantage
    assert float(out.metrics["clipped"]) == float(found == 0.0)
    return found


@pytest.mark.parametrize(
    ("live", "old", "advantage", "wanted"),
    [
        (0.50, 0.30, 1.0, 0.0),  # D 0.20 > 0.15, and A pushes it further up
        (0.50, 0.30, -1.0, 5 / 3),  # A pulls it back
        (0.20, 0.40, -1.0, 0.0),  # D 0.20, further down
        (0.20, 0.40, 1.0, 0.5),
        (0.40, 0.30, 1.0, 4 / 3),  # D 0.10: inside, though PPO would clip at 1.2
        (0.02, 0.01, 1.0, 2.0),  # a rare token, ratio 2, D 0.01: inside
        (0.001, 0.01, -1.0, 0.1),
        (0.99, 0.80, 1.0, 0.0),  # a likely token, ratio 1.24, D 0.19
        (0.30, 0.01, -1.0, 20.0),  # ratio 30, capped
        (0.30, 0.30, 1.0, 1.0),
    ],
)
def test_total_variation(live: float, old: float, advantage: float, wanted: float):
    assert coefficient("dppo_tv", live, old, advantage) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("live", "old", "advantage", "wanted"),
    [
        # 0.5 ln(0.5/0.8) + 0.5 ln(0.5/0.2) = 0.2231 > 0.05
        (0.80, 0.50, 1.0, 0.0),
        (0.80, 0.50, -1.0, 1.6),
        # 0.5 ln(0.5/0.6) + 0.5 ln(0.5/0.4) = 0.0204
        (0.60, 0.50, 1.0, 1.2),
        # 0.01 ln(1/3) + 0.99 ln(0.99/0.97) = 0.0092
        (0.03, 0.01, 1.0, 3.0),
        # 0.4 ln 4 + 0.6 ln(0.6/0.9) = 0.3112
        (0.10, 0.40, -1.0, 0.0),
        (0.10, 0.40, 1.0, 0.25),
    ],
)
def test_kl(live: float, old: float, advantage: float, wanted: float):
    assert coefficient("dppo_kl", live, old, advantage) == pytest.approx(wanted)


@pytest.mark.parametrize("weight", ["dppo_tv", "dppo_kl"])
def test_the_thresholds_of_the_two_directions(weight: str):
    wide = {"delta_low": 1e-9, "delta_high": 10.0}
    assert coefficient(weight, 0.9, 0.3, 1.0, **wide) == pytest.approx(3.0)
    assert coefficient(weight, 0.3, 0.9, -1.0, **wide) == 0.0
    wide = {"delta_low": 10.0, "delta_high": 1e-9}
    assert coefficient(weight, 0.9, 0.3, 1.0, **wide) == 0.0
    assert coefficient(weight, 0.3, 0.9, -1.0, **wide) == pytest.approx(1 / 3)


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-7, 0.0])
def test_the_kl_of_likely_tokens_keeps_its_digits_in_float32(gap: float):
    """The other tokens have the probability `gap` before and 0.2 after: D is log(1/0.8) and more.

    1 - p would be 0 in float32 below 6e-8.
    """
    live, old = math.log(0.8), math.log1p(-gap)
    exact = (1 - gap) * (old - live) + (gap * math.log(gap / 0.2) if gap else 0.0)
    for factor, cut in ((0.999, True), (1.001, False)):
        logprobs = torch.tensor([[live]]).requires_grad_()
        made = PolicyObjectiveInputs(
            logprobs=logprobs,
            old_logprobs=torch.tensor([[old]]),
            advantages=torch.tensor([[-1.0]]),
            response_mask=torch.ones(1, 1, dtype=torch.bool),
        )
        out = policy_objective(made, ratio="token", weight="dppo_kl", delta_low=factor * exact)
        assert bool(out.metrics["clipped"]) == cut


def test_refusals():
    with pytest.raises(ValueError, match=r"parameters\.delta_high: -0.1 is outside"):
        check_objective("token", "dppo_tv", {"delta_high": -0.1})
    with pytest.raises(ValueError, match=r"parameters\.cap: 0.5 must be at least 1"):
        check_objective("token", "dppo_kl", {"cap": 0.5})
    with pytest.raises(ValueError, match=r"ratio: 'product' with weight 'dppo_tv'"):
        check_objective("product", "dppo_tv", {})
