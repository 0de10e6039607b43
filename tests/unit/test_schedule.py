"""Learning-rate schedules, step by step."""

import pytest

from rlsys.config import OptimizerConfig
from workers.training.learning_rate import learning_rate


def rates(total: int, **settings: object) -> list[float]:
    optimizer = OptimizerConfig.model_validate({"learning_rate": 1.0, **settings})
    return [learning_rate(optimizer, step, total) for step in range(total)]


def test_constant_with_warm_up():
    assert rates(4, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


def test_linear_reaches_the_minimum_after_the_last_step():
    # x = 0, 1/5, ..., 4/5: 0.2 + 0.8 (1 - x); the step after the last would have 0.2
    assert rates(5, schedule="linear", minimum_ratio=0.2) == pytest.approx(
        [1.0, 0.84, 0.68, 0.52, 0.36]
    )
    assert rates(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_after_a_warm_up():
    # warm-up 1/1, then x = 0, 1/3, 2/3: (1 + cos(pi x)) / 2 = 1, 3/4, 1/4
    assert rates(4, schedule="cosine", warmup_steps=1) == pytest.approx([1.0, 1.0, 0.75, 0.25])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("total", [1, 2, 4])
def test_every_step_trains(schedule: str, warmup: int, total: int):
    assert min(rates(total, schedule=schedule, warmup_steps=warmup)) > 0


def test_a_warm_up_longer_than_the_run_is_cut_off():
    assert rates(2, schedule="linear", warmup_steps=4) == [0.25, 0.5]
    assert rates(2, schedule="cosine", warmup_steps=2) == [0.5, 1.0]


def test_a_run_of_one_step_trains_at_the_peak():
    assert rates(1, schedule="cosine") == [1.0]


def test_steps_beyond_the_end_stay_at_the_minimum():
    optimizer = OptimizerConfig(learning_rate=1.0, schedule="linear", minimum_ratio=0.1)
    assert learning_rate(optimizer, 50, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_a_step_of_one_update_has_the_rate_of_a_whole_step(schedule: str, warmup: int):
    optimizer = OptimizerConfig.model_validate(
        {"learning_rate": 1.0, "schedule": schedule, "warmup_steps": warmup}
    )
    whole = rates(4, schedule=schedule, warmup_steps=warmup)
    assert [learning_rate(optimizer, step, 4, width=1.0) for step in range(4)] == whole


def test_updates_within_a_step_are_as_many_shorter_steps():
    """Linear over 2 steps, of 2 and of 4 updates: x = 0, 1/4, then 4/8, 5/8, 6/8, 7/8."""
    optimizer = OptimizerConfig(learning_rate=1.0, schedule="linear")
    places = [(0.0, 0.5), (0.5, 0.5), (1.0, 0.25), (1.25, 0.25), (1.5, 0.25), (1.75, 0.25)]
    found = [learning_rate(optimizer, place, 2, width=width) for place, width in places]
    assert found == pytest.approx([1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8])


def test_a_warm_up_of_one_step_rises_over_its_updates():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=1)
    found = [learning_rate(optimizer, update / 3, 5, width=1 / 3) for update in range(3)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert learning_rate(optimizer, 1.0, 5, width=0.5) == 1.0
