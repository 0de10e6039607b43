"""Totals of a run, with the arithmetic beside them."""

from __future__ import annotations

import math

import pytest

from rlsys.run.observers.metrics_log import MetricsRecord
from rlsys.run.observers.run_summary import Change, Warnings, run_summary
from tests.support.step_values import PARTLY, STEP


def train(step: int, **values: float) -> MetricsRecord:
    """Return the record of a training step; names are written with __ for the slash."""
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return MetricsRecord(kind="train", step=step, time=0.0, values=STEP | named)


def evaluation(step: int, accuracy: float) -> MetricsRecord:
    return MetricsRecord(kind="eval", step=step, time=0.0, values={"eval/accuracy": accuracy})


def test_means_are_over_the_first_and_the_last_tenth_of_the_steps():
    """Rewards 0.01 ... 0.20 over 20 steps: (0.01 + 0.02) / 2 and (0.19 + 0.20) / 2."""
    summary = run_summary(train(step, reward__mean=step / 100) for step in range(1, 21)).training
    assert summary is not None
    assert summary.averaged_steps == 2
    assert (summary.reward.first, summary.reward.last) == pytest.approx((0.015, 0.195))
    assert summary.reward.text("{:.3f}") == "0.015 -> 0.195"


def test_tokens_times_and_memory():
    """Two steps of 100 and 50 tokens and 8 greedy ones, generated in 2 s each: 158 / 4 s."""
    steps = [
        train(1, memory__policy=5.0),
        train(2, rollout__tokens=50, rollout__greedy_tokens=8, memory__policy=3.0, time__step=10),
    ]
    summary = run_summary(steps).training
    assert summary is not None
    assert summary.sampled_tokens == 158
    assert summary.tokens_per_second == pytest.approx(39.5)
    assert summary.seconds["time/step"] == 9.0
    assert summary.seconds["time/sync"] == 0.0
    assert summary.peak_memory_gib == {"policy": 5.0}
    assert summary.last_step == 2


def test_evaluations_are_compared_whatever_stands_between_them():
    summary = run_summary([evaluation(0, 0.1), train(1), evaluation(1, 0.3), evaluation(5, 0.6)])
    assert summary.accuracy == Change(first=0.1, last=0.6)
    assert summary.evaluated_steps == (0, 5)


def test_a_run_without_steps_or_evaluations_has_no_figures():
    empty = run_summary([])
    assert (empty.accuracy, empty.evaluated_steps, empty.training) == (None, None, None)
    assert run_summary([evaluation(0, 0.5)]).training is None


def test_the_trained_part_is_told_only_where_it_is_not_the_whole():
    all_trained = run_summary([train(1, trained__responses=96, rollout__responses=96)]).training
    assert all_trained is not None
    assert all_trained.trained is None

    third = {name.replace("/", "__"): value for name, value in PARTLY.items()}
    partly = run_summary([train(1, **third)]).training
    assert partly is not None
    assert partly.trained is not None
    assert partly.trained.fraction == pytest.approx(32 / 96)
    assert partly.trained.reward.text("{:.1f}") == "0.5 -> 0.5"


def test_warnings_of_a_kind_are_counted():
    steps = [train(step, reward__errors=float(step)) for step in (1, 2, 3)]
    summary = run_summary([train(0), *steps, train(4, reward__mean=math.nan)]).training
    assert summary is not None
    failed = "reward functions failed on responses of this step: errors 3"
    assert summary.warnings == [
        Warnings(kind="rewards failed", steps="3 steps, 1 to 3", last=failed),
        Warnings(kind="not finite", steps="step 4", last="not finite: reward/mean"),
    ]


def test_a_change_without_a_value_is_a_dash():
    assert Change(first=math.nan, last=0.5).text("{:.1%}", arrow="→") == "- → 50.0%"
