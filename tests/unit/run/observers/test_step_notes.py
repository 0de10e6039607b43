"""Remarks on steps: each appears for its metrics, and for no others."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from rlsys.run.observers.step_notes import step_notes

FINE = {
    "reward/errors": 0.0,
    "reward/timeouts": 0.0,
    "reward/crashes": 0.0,
    "rollout/responses": 64.0,
    "rollout/truncated_fraction": 0.25,
    "trained/responses": 64.0,
    "trained/frac_reward_zero_std": 0.5,
    "advantage/mean_abs": 0.3,
    "policy/updates": 4.0,
    "policy/skipped_updates": 0.0,
    "policy/nonfinite_gradients": 0.0,
}


def texts(values: Mapping[str, float]) -> list[str]:
    return [note.text for note in step_notes({**FINE, **values})]


def test_nothing_is_said_of_a_step_in_order():
    assert texts({}) == []
    assert step_notes({}) == []
    assert (
        texts({"trained/frac_reward_zero_std": 1.0}) == []
    )  # groups of one, and no baseline: it learns


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"rollout/truncated_fraction": 1.0},
            "every response was truncated at generation.max_tokens",
        ),
        (
            {
                "rollout/truncated_fraction": 1.0,
                "trained/responses": 0.0,
                "policy/skipped_updates": 1,
            },
            "every response was truncated at generation.max_tokens and masked out of the loss: "
            "nothing was trained",
        ),
        ({"trained/responses": 0.0}, "no response entered the loss: nothing was trained"),
        (
            {"trained/frac_reward_zero_std": 1.0, "advantage/mean_abs": 0.0},
            "every group has equal rewards, so all advantages are 0: nothing was learned from the "
            "rewards",
        ),
        ({"advantage/mean_abs": 0.0}, "all advantages are 0: nothing was learned from the rewards"),
        (
            {"sampling/missing_groups": 2.0, "sampling/rounds": 3.0},
            "groups without a learning signal that fill the batch, after 3 rounds of sampling: 2",
        ),
        (
            {
                "policy/updates": 1.0,
                "policy/skipped_updates": 3.0,
                "policy/nonfinite_gradients": 1.0,
            },
            "3 of 4 updates skipped: 1 with a gradient that is not finite, 2 without a trained "
            "response",
        ),
        (
            {"reward/errors": 2.0, "reward/timeouts": 1.0},
            "reward functions failed on responses of this step: errors 2, timeouts 1",
        ),
        (
            {"advantage/a": math.nan, "policy/loss": math.inf, "x": math.nan, "y": math.nan},
            "not finite: advantage/a, policy/loss, x and 1 more",
        ),
    ],
)
def test_what_is_said(values: Mapping[str, float], text: str):
    assert texts(values) == [text]
    assert step_notes({**FINE, **values})[0].warning


def test_what_was_trained_is_said_where_it_is_not_everything_and_is_no_warning():
    part = {
        "rollout/responses": 96.0,
        "trained/reward_mean": 0.281,
        "trained/accuracy": 0.281,
        "policy/skipped_updates": 1.0,
    }
    warning, note = step_notes({**FINE, **part})
    assert warning.warning  # first
    assert note.text == "trained on 64 of 96 responses: reward 0.281, correct 28.1%"
    assert not note.warning


def test_no_fraction_of_correct_responses_is_said_where_none_is_measured():
    part = {"rollout/responses": 96.0, "trained/reward_mean": 0.281}
    (note,) = step_notes({**FINE, **part})
    assert note.text == "trained on 64 of 96 responses: reward 0.281"
