"""The moving average of each problem: golden numbers, state, and missing ids."""

from __future__ import annotations

import json

import pytest
import torch

from rlsys.algorithms.advantages import check_advantage_estimator, rae_advantages, run_estimator
from tests.support.advantage_examples import inputs


def test_golden_over_three_batches():
    # first visit of p: no baseline; keep 1/2^2 = 1/4, m = 3/4 * mean 1/2 = 3/8, w = 3/4
    first = rae_advantages(inputs([1.0, 0.0], [0, 0], problem_ids=["p", "p"]), decay=0.5)
    assert first.advantages[:, 0].tolist() == [1.0, 0.0]
    assert first.state == {"averages": {"p": [3 / 8, 3 / 4]}}

    # p again beside the new q: baseline 1/2 for p, 0 for q;
    # p: keep 1/2, m = 3/16 + 1/2 * 1 = 11/16, w = 3/8 + 1/2 = 7/8
    second = rae_advantages(
        inputs([1.0, 1.0], [4, 5], problem_ids=["p", "q"], state=first.state), decay=0.5
    )
    assert second.advantages[:, 0].tolist() == [0.5, 1.0]
    assert second.state == {"averages": {"p": [11 / 16, 7 / 8], "q": [0.5, 0.5]}}
    assert second.diagnostics == {"baseline": 0.25, "seen_before": 0.5}

    third = rae_advantages(inputs([0.0], [9], problem_ids=["p"], state=second.state), decay=0.5)
    assert third.advantages[0].tolist() == pytest.approx([-11 / 14] * 2)


def test_n_responses_move_the_average_as_far_as_n_single_ones_with_their_mean():
    state: dict = {}
    for _ in range(5):
        made = inputs([0.4], [0], problem_ids=["p"], state=state)
        state = dict(rae_advantages(made, decay=0.9).state)
    made = inputs([0.2, 0.3, 0.4, 0.5, 0.6], [0] * 5, problem_ids=["p"] * 5)
    (together,) = rae_advantages(made, decay=0.9).state["averages"].values()
    assert together == pytest.approx(state["averages"]["p"], rel=1e-6)


def test_process_rewards_are_returned_to_go():
    made = inputs(
        [1.0],
        [0],
        problem_ids=["p"],
        token_rewards=torch.tensor([[0.5, 0.25]]),
        state={"averages": {"p": [0.6, 0.5]}},
    )
    # to go 1.75 and 1.25, baseline 0.6 / 0.5 = 1.2; the average takes the whole reward
    out = rae_advantages(made, decay=0.0)
    assert out.advantages[0].tolist() == pytest.approx([0.55, 0.05])
    assert out.state == {"averages": {"p": [1.75, 1.0]}}


def test_the_state_survives_json_and_other_problems_keep_theirs():
    state = json.loads(json.dumps({"averages": {"old": [0.5, 0.9]}}))
    out = rae_advantages(inputs([1.0], [0], problem_ids=["new"], state=state))
    assert out.state["averages"]["old"] == [0.5, 0.9]
    assert set(out.state["averages"]) == {"old", "new"}


def test_masks_and_float64():
    made = inputs([1.0, 0.0, 0.5], [0, 0, 1], [3, 1, 0], problem_ids=["a", "a", "b"])
    out = rae_advantages(made).advantages
    assert out[0].tolist() == [1.0, 1.0, 1.0]
    assert (out[~made.response_mask] == 0).all()


def test_refusals():
    with pytest.raises(ValueError, match=r"'rae' needs problem_ids, .* the id of its problem"):
        run_estimator("rae", inputs([1.0], [0]), {})
    with pytest.raises(ValueError, match="problem_ids must have 2 entries, not 1"):
        inputs([1.0, 0.0], [0, 0], problem_ids=["p"])
    with pytest.raises(ValueError, match=r"^algorithm.*parameters\.decay: 1.0 is outside \[0, 1\)"):
        check_advantage_estimator("rae", {"decay": 1.0})
