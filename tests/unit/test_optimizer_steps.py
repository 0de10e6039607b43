"""Optimizer steps of a trained model: schedule, and what counts as a step."""

from typing import Any

import pytest

from rlsys.config import OptimizerConfig
from rlsys.metrics import values
from workers.training.optimizer_steps import OptimizerSteps


class Backend:
    """A backend that returns given gradient norms, and keeps the learning rates."""

    def __init__(self, *norms: float) -> None:
        self.norms = list(norms)
        self.rates: list[float] = []

    def step(self, learning_rate: float) -> float:
        self.rates.append(learning_rate)
        return self.norms.pop(0)


def test_all_mini_batches_of_a_trainer_step_have_its_rate():
    """Linear from 1 over 2 trainer steps: 1, then 1/2."""
    steps = OptimizerSteps("critic", OptimizerConfig(learning_rate=1.0, schedule="linear"), 2)
    backend: Any = Backend(3.0, float("inf"), 4.0)

    steps.begin(empty=1)
    first = [values(steps.take(backend)) for _ in range(2)]
    assert first == [{"critic/grad_norm": 3.0}, {}]
    assert values(steps.end(rank=0)) == {
        "critic/learning_rate": 1.0,
        "critic/updates": 1,
        "critic/skipped_updates": 2,
        "critic/nonfinite_gradients": 1,
    }

    steps.begin(empty=0)
    steps.take(backend)
    assert backend.rates == pytest.approx([1.0, 1.0, 0.5])
    assert values(steps.end(rank=1)) == {"critic/learning_rate": 0.5}
    assert steps.completed == 2


def test_a_schedule_spread_over_the_updates_of_a_step_counts_one_step():
    """Linear from 1 over 2 trainer steps, of 2 updates and of 1; a broken one counts too."""
    steps = OptimizerSteps("policy", OptimizerConfig(learning_rate=1.0, schedule="linear"), 2)
    backend: Any = Backend(1.0, float("nan"), 1.0)
    steps.begin(empty=0, spread_over=2)
    steps.take(backend)
    steps.take(backend)
    assert values(steps.end(rank=0))["policy/learning_rate"] == pytest.approx(0.75)
    assert steps.completed == 1

    steps.begin(empty=0, spread_over=1)
    steps.take(backend)
    steps.end(rank=0)
    assert backend.rates == pytest.approx([1.0, 0.75, 0.5])


def test_a_step_without_an_update_counts_in_the_schedule():
    steps = OptimizerSteps("policy", OptimizerConfig(learning_rate=1.0, schedule="linear"), 2)
    steps.begin(empty=1, spread_over=0)
    assert values(steps.end(rank=0))["policy/skipped_updates"] == 1
    assert steps.rate == pytest.approx(0.5)
