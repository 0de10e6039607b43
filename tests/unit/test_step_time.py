"""The estimate of a step's time, and the report of a step that takes far longer."""

import os
from dataclasses import replace

import pytest

from rlsys.config import (
    AlgorithmConfig,
    GenerationConfig,
    KLConfig,
    PolicyConfig,
    RunConfig,
    TrainerConfig,
)
from rlsys.config.hardware import Hardware
from rlsys.run import step_time
from rlsys.run.compute_dtype import ProductSpeed
from rlsys.run.step_time import StepEstimate, StepTimeWatch, estimate_step, likely_causes

CPU = Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
SPEED = ProductSpeed(float32=50, bfloat16=5)  # of one of two cores
CONFIG = RunConfig(
    generation=GenerationConfig(dtype="float32", samples_per_prompt=5, max_tokens=10),
    policy=PolicyConfig(compute_dtype="float32"),
    trainer=TrainerConfig(prompts_per_step=2),
)
SIZES = {"parameters": 1_000_000_000, "prompt_tokens": 50.0}


def test_the_estimate_counts_the_operations_of_training_and_sampling():
    """Estimate 2 prompts of 50 tokens with 100 response tokens, at 1e9 parameters and 1e11 op/s."""
    estimate = estimate_step(CONFIG, CPU, **SIZES, speed=SPEED)
    assert estimate is not None
    assert estimate.training_s == pytest.approx(6 * 200 / 100)
    # vLLM takes three times as long as the arithmetic.
    assert estimate.sampling_s == pytest.approx(3 * 2 * 200 / 100)

    changed = CONFIG.model_copy(
        update={
            "algorithm": AlgorithmConfig(kl=KLConfig(coefficient=0.1)),
            "policy": PolicyConfig(
                compute_dtype="bfloat16", num_mini_batches=2, shared_prefix_packing=False
            ),
        }
    )
    more = estimate_step(changed, CPU, **SIZES, speed=SPEED)
    assert more is not None
    # 10 whole sequences of 60 tokens; forward and backward, and a forward pass each for the old and
    # the reference policy.
    assert more.training_s == pytest.approx((6 + 2 + 2) * 600 / 10)


def test_without_a_measurement_of_the_workers_machine_nothing_is_estimated(
    monkeypatch: pytest.MonkeyPatch,
):
    assert estimate_step(CONFIG, CPU, **SIZES, speed=None) is None
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert estimate_step(CONFIG, CPU, **SIZES, speed=SPEED) is None


def watched(estimate: StepEstimate | None, causes: list[str]) -> tuple[StepTimeWatch, list[str]]:
    reports: list[str] = []
    return StepTimeWatch(estimate, lambda: causes, reports.append), reports


ESTIMATE = StepEstimate(training_s=3.0, sampling_s=1.0)  # 5 s with the overhead


def test_a_step_of_ten_times_the_estimate_is_reported_once_with_causes():
    watch, reports = watched(ESTIMATE, ["this", "that"])
    watch.on_step(1, {"time/step": 49.0})
    assert reports == []
    watch.on_step(2, {"time/step": 100.0})
    watch.on_step(3, {"time/step": 100.0})
    assert reports == ["step 2 took 100 s, 20 times the estimate. Likely causes: this; that."]


@pytest.mark.parametrize(
    "values",
    [
        {"time/step": 100.0, "time/reward": 60.0},  # the user's own functions
        {"time/step": 100.0, "sampling/rounds": 3.0},  # dynamic sampling
    ],
)
def test_waiting_for_rewards_and_sampling_again_are_not_reported(values: dict[str, float]):
    watch, reports = watched(ESTIMATE, [])
    watch.on_step(1, values)
    assert reports == []


def test_without_an_estimate_nothing_is_reported():
    watch, reports = watched(None, [])
    watch.on_step(1, {"time/step": 1e6})
    assert reports == []


def test_each_cause_is_named_only_where_it_is_seen(monkeypatch: pytest.MonkeyPatch):
    cores = os.cpu_count() or 1
    monkeypatch.setattr(os, "getloadavg", lambda: (1.0 * cores, 0.0, 0.0))
    monkeypatch.setattr(step_time, "_memory_pressure", list)
    assert likely_causes(CONFIG, CPU, SPEED) == []

    slow = CONFIG.model_copy(update={"policy": PolicyConfig(compute_dtype="bfloat16")})
    (emulated,) = likely_causes(slow, CPU, SPEED)
    assert "policy.compute_dtype is bfloat16" in emulated
    assert "0.1 times" in emulated
    assert likely_causes(slow, CPU, replace(SPEED, bfloat16=150)) == []

    monkeypatch.setattr(os, "getloadavg", lambda: (5.0 * cores, 0.0, 0.0))
    (load,) = likely_causes(CONFIG, CPU, SPEED)
    assert f"load average {5.0 * cores:.1f}" in load


@pytest.mark.parametrize(("free", "reports"), [(0.5, False), (0.01, True)])
def test_memory_pressure_is_that_of_the_process(
    free: float, reports: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(step_time, "available_memory_fraction", lambda: free)
    swap = type("Swap", (), {"used": 0, "total": 0})()
    monkeypatch.setattr(step_time.psutil, "swap_memory", lambda: swap)
    assert bool(step_time._memory_pressure()) is reports
