"""Importance weights for the mismatch between engine and trainer."""

import math
from typing import Any

import pytest
import torch

from rlsys.algorithms.policy_objectives import (
    off_policy_sequence_mask,
    responses_within_kl,
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
    assert correction([two, two, half], level="geometric") == pytest.approx(
        [2.0 ** (1 / 3)] * 3  # (2 * 2 / 2)^(1/3)
    )
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


def test_the_geometric_mean_does_not_depend_on_the_length():
    for length in (1, 3, 50):
        assert correction([0.1] * length, level="geometric", cap=9.0) == pytest.approx(
            [math.exp(0.1)] * length
        )


def test_the_geometric_mean_is_over_the_response_alone():
    old = torch.tensor([[0.4, 0.2, 9.0]])
    mask = torch.tensor([[True, True, False]])
    weights = rollout_correction(old, torch.zeros(1, 3), mask, level="geometric")
    assert weights[0].tolist() == pytest.approx([math.exp(0.3), math.exp(0.3), 0.0])


# Log-ratios 0.2 and -0.4 of one response: its estimates of KL(rollout || old) per token.
TWO_TOKENS = [0.2, -0.4]
ESTIMATES = {
    "k1": 0.1,  # (-0.2 + 0.4) / 2
    "k2": 0.05,  # (0.02 + 0.08) / 2
    "k3": (math.exp(0.2) - 1 - 0.2 + math.exp(-0.4) - 1 + 0.4) / 2,
}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_responses_are_rejected_above_the_kl(estimator: str):
    old = torch.tensor([[*TWO_TOKENS, 5.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    value = ESTIMATES[estimator]
    for threshold, kept in ((value + 1e-6, True), (value - 1e-6, False)):
        found = responses_within_kl(
            old, torch.zeros(2, 3), mask, estimator=estimator, threshold=threshold
        )
        assert found.tolist() == [[kept, kept, False], [True, True, True]]


def test_the_unbiased_estimators_average_to_the_kl():
    """Take the expectation over all tokens of a policy of three tokens."""
    rollout = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    old = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    kl = float((rollout * (rollout / old).log()).sum())
    d = old.log() - rollout.log()
    assert float((rollout * -d).sum()) == pytest.approx(kl)
    assert float((rollout * (d.exp() - 1 - d)).sum()) == pytest.approx(kl)

    # Repeated in proportion to their probabilities, they are one response with that mean.
    response = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    mask = torch.ones(1, 10, dtype=torch.bool)
    for estimator in ("k1", "k3"):
        for threshold, kept in ((kl + 1e-9, True), (kl - 1e-9, False)):
            found = responses_within_kl(
                old.log()[response][None],
                rollout.log()[response][None],
                mask,
                estimator=estimator,
                threshold=threshold,
            )
            assert bool(found.all()) is kept


def test_unknown_estimators_are_refused():
    with pytest.raises(ValueError, match=r"sequence_kl: unknown 'k4'"):
        responses_within_kl(
            torch.zeros(1, 1),
            torch.zeros(1, 1),
            torch.ones(1, 1, dtype=torch.bool),
            estimator="k4",
            threshold=1.0,
        )


def test_far_responses_are_masked_where_the_advantage_is_negative():
    # Means of log rollout - log live: 0.3, 0.3, 0.1 and, beside a token that is none, 0.3.
    live = torch.tensor([[-0.2, -0.4], [-0.2, -0.4], [-0.2, 0.0], [-0.3, 7.0]], requires_grad=True)
    advantages = torch.tensor([[-1.0, -1.0], [1.0, -2.0], [-1.0, -1.0], [-1.0, -1.0]])
    mask = torch.tensor([[True, True]] * 3 + [[True, False]])
    kept = off_policy_sequence_mask(live, torch.zeros(4, 2), advantages, mask, threshold=0.2)
    assert kept.tolist() == [[False, False], [True, False], [True, True], [False, False]]
    assert not kept.requires_grad


def test_an_advantage_of_zero_is_not_negative():
    kept = off_policy_sequence_mask(
        torch.tensor([[-9.0]]),
        torch.zeros(1, 1),
        torch.zeros(1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        threshold=0.1,
    )
    assert kept.tolist() == [[True]]
