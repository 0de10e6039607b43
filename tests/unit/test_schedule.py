"""Learning rates step by step."""

import pytest

from rlsys.config import OptimizerConfig
from workers.policy.schedule import learning_rate


def rates(total: int, **settings: object) -> list[float]:
    optimizer = OptimizerConfig.model_validate({"learning_rate": 1.0, **settings})
    return [learning_rate(optimizer, step, total) for step in range(total)]


def test_constant_with_warm_up():
    assert rates(4, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


def test_linear_falls_to_the_minimum_at_the_last_step():
    assert rates(5, schedule="linear", minimum_ratio=0.2) == pytest.approx(
        [1.0, 0.8, 0.6, 0.4, 0.2]
    )


def test_cosine_after_a_warm_up():
    # warm-up 1/1, then x = 0, 1/2, 1
    assert rates(4, schedule="cosine", warmup_steps=1) == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_a_run_of_one_step_trains_at_the_peak():
    assert rates(1, schedule="cosine") == [1.0]


def test_steps_beyond_the_end_stay_at_the_minimum():
    optimizer = OptimizerConfig(learning_rate=1.0, schedule="linear", minimum_ratio=0.1)
    assert learning_rate(optimizer, 50, 10) == pytest.approx(0.1)
