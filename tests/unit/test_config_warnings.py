"""Warnings about configurations that are accepted but may not do what was intended."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.grpo_math import grpo_math
from recipes.run_recipe import run_recipe
from rlsys.algorithms.policy_objectives import (
    available_weights,
    gradient_coefficient,
    ignores_ratio,
    is_one_at_ratio_one,
)
from rlsys.config import KLConfig, RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS
from rlsys.run.config_warnings import config_warnings
from rlsys.run.directory import RunDirectory
from rlsys.run.preflight import config_mistakes


def config(preset: str, **policy: Any) -> RunConfig:
    default = grpo_math(Hardware(gpus=0, gpu_memory_gib=0, cpus=2, memory_gib=8))
    return default.model_copy(
        update={
            "algorithm": PRESETS[preset].algorithm,
            "policy": default.policy.model_copy(
                update={"epochs": 1, "num_mini_batches": 1} | policy
            ),
        }
    )


@pytest.mark.parametrize("updates", [{"epochs": 2}, {"num_mini_batches": 4}])
def test_several_updates_without_a_ratio_are_said_to_be_uncorrected(updates: dict[str, int]):
    (warning,) = config_warnings(config("rloo", **updates))
    assert warning.startswith("algorithm.objective.weight: 'none' does not correct")
    assert "ppo_clip" in warning


def test_no_warning_where_nothing_is_off_policy_or_where_it_is_corrected():
    assert not list(config_warnings(config("rloo")))
    assert not list(config_warnings(config("grpo", num_mini_batches=4)))
    assert not list(config_warnings(config("hierarchical", num_mini_batches=4)))  # recomputes


def test_a_ratio_that_only_weighs_the_kl_needs_a_second_update():
    kl = KLConfig(coefficient=0.1, kind="k2", importance_ratio="token")

    def warned(num_mini_batches: int, kl: KLConfig) -> list[str]:
        made = config("grpo", num_mini_batches=num_mini_batches)
        algorithm = made.algorithm.model_copy(update={"kl": kl})
        return list(config_warnings(made.model_copy(update={"algorithm": algorithm})))

    (warning,) = warned(1, kl)
    assert warning.startswith("algorithm.kl.importance_ratio: 'token' with kind 'k2'")
    assert not warned(2, kl)
    assert not warned(1, kl.model_copy(update={"kind": "k3"}))  # its gradient flows through it


def test_weights_that_ignore_the_ratio():
    assert [name for name in available_weights() if ignores_ratio(name, {})] == ["none"]
    assert ignores_ratio("power", {"q": 0.0})
    assert ignores_ratio("cispo", {"clip_low": 0.0, "clip_high": 0.0})


@pytest.mark.parametrize(
    ("weight", "parameters"),
    [
        *((weight, {}) for weight in available_weights()),
        ("power", {"q": 0.0}),
        ("power", {"q": 1.0}),
        ("cispo", {"clip_low": 0.0, "clip_high": 0.0}),
        ("cispo", {"clip_low": 0.0, "clip_high": 0.1}),
        ("ppo_clip", {"clip_low": 0.0, "clip_high": 0.0}),
        ("adaptive_power", {"target_ess": 1.0}),
        ("dro", {"beta": 0.0}),
        ("vespo", {"k_pos": 0.0, "lambda_pos": 0.0, "k_neg": 0.0, "lambda_neg": 0.0}),
        ("adaptive_power", {"q": 0.0}),
        ("adaptive_power", {"target_ess": 1.0, "q": 0.5}),
        ("minimum", {"functions": [{"kind": "power", "q": 0.5}, {"kind": "ratio"}]}),
        ("minimum", {"functions": [{"kind": "clip"}, {"kind": "ratio"}]}),
    ],
)
def test_what_a_weight_declares_of_the_ratio_is_what_its_gradient_does(
    weight: str, parameters: dict[str, Any]
):
    logs = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    coefficients = torch.stack(
        [
            gradient_coefficient(weight, logs, torch.full_like(logs, sign), **parameters)
            for sign in (1.0, -1.0)
        ]
    )
    constant = bool((coefficients == coefficients[:, :1]).all())
    assert ignores_ratio(weight, parameters) == constant
    if weight == "clip_cov":  # the tokens that it chooses have no gradient, at any ratio
        assert not is_one_at_ratio_one(weight, parameters)
        return
    at_one = gradient_coefficient(weight, torch.zeros(2), torch.tensor([1.0, -1.0]), **parameters)
    assert is_one_at_ratio_one(weight, parameters) == torch.allclose(at_one, torch.ones(2))


def test_a_dry_run_shows_the_warnings(capsys: pytest.CaptureFixture[str]):
    flags = [
        "--model.path",
        "tiny",
        "--algorithm.objective.weight",
        "none",
        "--policy.num_mini_batches",
        "4",
        "--dry-run",
    ]
    with pytest.raises(SystemExit) as exit_:
        run_recipe(grpo_math, flags)
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "warning: algorithm.objective.weight: 'none' does not correct" in out


def test_a_warm_up_that_never_ends_is_a_warning():
    cpu = Hardware(cpus=8, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
    made = evolve(grpo_math(cpu), {"policy.optimizer.warmup_steps": 120})
    (warning,) = config_warnings(made)
    assert warning.startswith(
        "policy.optimizer.warmup_steps: 120 is above trainer.steps 60, so the learning rate ends "
        "at "
    )
    assert "5e-06" in warning
    assert not list(config_warnings(evolve(made, {"trainer.steps": 120})))


def test_a_warm_up_of_the_rate_of_critic_or_policy_that_never_ends_is_a_warning():
    """The policy is trained in the steps after the critic's warm-up only: 60 - 20."""
    cpu = Hardware(cpus=8, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
    ppo = evolve(grpo_math(cpu), {"preset": "ppo", "critic.warmup_steps": 20})
    assert not list(config_warnings(ppo))
    rates = {"policy.optimizer.warmup_steps": 50, "critic.optimizer.warmup_steps": 61}
    policy, critic = config_warnings(evolve(ppo, rates))
    assert (
        "policy.optimizer.warmup_steps: 50 is above trainer.steps - critic.warmup_steps 40"
        in policy
    )
    assert critic.startswith("critic.optimizer.warmup_steps: 61 is above trainer.steps 60")


def test_stale_samples_without_a_correction():
    """A correction, or an estimator that contains it, ends the warning; the KL has its own."""

    def warned(preset: str, **changes: Any) -> list[str]:
        return list(config_warnings(evolve(config(preset, num_mini_batches=4), changes)))

    stale = {"trainer.max_staleness": 2}
    (warning,) = warned("dapo", **stale)
    assert warning.startswith("trainer.max_staleness: 2 without a correction trains samples of")
    assert "(hierarchical)" in warning
    correction = {"algorithm.rollout_correction.level": "token"}
    assert not warned("dapo", **stale, **correction)
    assert not warned("hierarchical", **stale)

    kl = {"algorithm.kl.coefficient": 0.1}
    (warning,) = warned("dapo", **stale, **correction, **kl)
    assert warning.startswith("algorithm.kl.kind: 'k3' estimates the KL from the sampled tokens")
    assert not warned("dapo", **stale, **correction, **kl, **{"algorithm.kl.kind": "exact"})


def test_an_estimator_that_compares_with_a_greedy_response_is_refused_with_stale_samples():
    changes = {"algorithm.advantage.name": "remax", "trainer.max_staleness": 1}
    made = evolve(config("grpo"), changes | {"generation.engine": "transformers"})
    machine = Hardware(gpus=0, gpu_memory_gib=0, cpus=4, memory_gib=32)
    found = config_mistakes(made, RunDirectory(Path("runs/never-made")), machine, resume=False)
    (mistake,) = [line for line in found if "remax" in line]
    assert "greedy response under the same weights" in mistake
