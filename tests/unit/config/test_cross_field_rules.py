"""Fields that contradict each other are refused together when a configuration is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from recipes.grpo_math import grpo_math
from rlsys.config import ConfigError, GenerationConfig, PolicyConfig, RunConfig, TrainerConfig
from rlsys.config.command_line import evolve, parse
from rlsys.config.cross_field_rules import contradictions
from rlsys.config.hardware import Hardware

CPU = Hardware(cpus=8, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
GPU = Hardware(cpus=16, memory_gib=128.0, gpus=2, gpu_memory_gib=80.0)
RECIPE = grpo_math(CPU)
RECOMPUTE = {"algorithm.advantage.recompute": True, "algorithm.objective.weight": "none"}
MASK = "algorithm.rollout_correction.mask_"
KL = {"algorithm.kl.coefficient": 0.1}
STALE = {"trainer.max_staleness": 2}
CRITIC = {"critic.enabled": True}
ZERO_1 = {"policy.backend": "deepspeed", "policy.deepspeed.zero_stage": 1}


@pytest.mark.parametrize("hardware", [CPU, GPU])
def test_the_recipe_of_a_machine_contradicts_nothing(hardware: Hardware):
    assert contradictions(grpo_math(hardware)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy.num_mini_batches": 3},
            "policy.num_mini_batches: 3 does not divide trainer.prompts_per_step 8.",
        ),
        (
            {**ZERO_1, "trainer.checkpoints.asynchronous": True},
            "trainer.checkpoints.asynchronous: true is not supported by policy.backend 'deepspeed'",
        ),
        (
            {"trainer.asynchronous.update": "interrupt"},
            "trainer.asynchronous.update: 'interrupt' is not supported",
        ),
        (
            {**STALE, "trainer.asynchronous.groups_per_call": 9},
            "trainer.asynchronous.groups_per_call: 9 is above trainer.prompts_per_step 8",
        ),
        (
            {**STALE, "generation.workers": 17},
            "generation.workers: 17 workers share the 8 prompts",
        ),
        ({**STALE, **CRITIC}, "critic.enabled: True with trainer.max_staleness 2 would be"),
        (
            {**STALE, **KL, "algorithm.kl.placement": "reward"},
            "algorithm.kl.placement: 'reward' with trainer.max_staleness 2",
        ),
        (
            {**STALE, **KL, "algorithm.kl.importance_ratio": "token"},
            "algorithm.kl.importance_ratio: 'token' with trainer.max_staleness 2",
        ),
        (
            {**STALE, **KL, "algorithm.kl.target": 0.1},
            "algorithm.kl.target: 0.1 with trainer.max_staleness 2",
        ),
        (
            {**STALE, "algorithm.kl_old.coefficient": 0.1, "policy.epochs": 2},
            "algorithm.kl_old.coefficient: 0.1 with trainer.max_staleness 2",
        ),
        (
            {**STALE, "algorithm.entropy.temperature": 0.1},
            "algorithm.entropy.temperature: 0.1 with trainer.max_staleness 2",
        ),
        ({"policy.ranks": 65}, "policy.ranks: 65 ranks for fewer responses per step. Raise"),
        (
            {**ZERO_1, "policy.deepspeed.offload_weights": True},
            "policy.deepspeed.offload_weights: true needs sharded weights, and "
            "policy.deepspeed.zero_stage is 1. Set the stage to 3",
        ),
        (
            {**ZERO_1, "diagnostics.gradient": True},
            "diagnostics.gradient: true differentiates a part of the model by itself, which",
        ),
        ({"reference.ranks": 2}, "reference.ranks: 2 is above policy.ranks 1, and each rank"),
        (
            {**CRITIC, "critic.num_mini_batches": 3},
            "critic.num_mini_batches: 3 does not divide trainer.prompts_per_step 8.",
        ),
        ({**CRITIC, "critic.ranks": 2}, "critic.ranks: 2 is above policy.ranks 1, and each rank"),
        (
            {**CRITIC, **RECOMPUTE},
            "critic.enabled: true with algorithm.advantage.recompute, where the ranks",
        ),
        (
            {**CRITIC, "critic.warmup_steps": 60},
            "critic.warmup_steps: 60 of trainer.steps 60, so the policy would never be trained",
        ),
        (
            {**CRITIC, **KL, "critic.warmup_steps": 2, "algorithm.kl.target": 0.1},
            "algorithm.kl.target: 0.1 is approached from step to step, and in critic.warmup_steps",
        ),
        (
            {**CRITIC, "critic.optimizer.learning_rate": 0.5, "critic.optimizer.weight_decay": 2.0},
            "critic.optimizer.weight_decay: 2 times",
        ),
        ({"generation.workers": 9}, "generation.workers: 9 workers share the 8 prompts"),
        (
            {"generation.min_tokens": 17},
            "generation.min_tokens: 17 is above generation.max_tokens 16. Lower it",
        ),
        (
            {"generation.max_model_tokens": 100},
            "generation.max_model_tokens: 100 is less than data.max_prompt_tokens + "
            "generation.max_tokens = 176",
        ),
        (
            {"trainer.evaluation.pass_at": [1, 8]},
            "trainer.evaluation.pass_at: pass@8 needs as many samples",
        ),
        (
            {"policy.optimizer.learning_rate": 0.5, "policy.optimizer.weight_decay": 2.0},
            "policy.optimizer.weight_decay: 2 times",
        ),
        (
            {"reward.functions": [{"name": "math", "weight": 0.0}]},
            "reward.functions: every weight is 0",
        ),
        (
            {"reward.functions": [{"name": "math"}, {"name": "math"}]},
            "reward.functions: math, math names a function twice",
        ),
        ({"reward.timeout_s": 1e20}, "reward.timeout_s: 1e+20 is more than a day"),
        ({"reward.memory_gb": 1e20}, "reward.memory_gb: 1e+20 is more than a process can have"),
        (
            {"algorithm.kl.target": 0.1},
            "algorithm.kl.target: 0.1 can only be reached from a coefficient above 0",
        ),
        (
            {**KL, "algorithm.kl.kind": "exact", "policy.packing": False},
            "algorithm.kl.kind: 'exact' needs the packed forward pass",
        ),
        (
            {**KL, "algorithm.kl.level": "sequence"},
            "algorithm.aggregation: 'token_mean' with algorithm.kl.level 'sequence'",
        ),
        (
            {**KL, "algorithm.kl.placement": "reward", "algorithm.kl.level": "sequence"},
            "algorithm.kl.level: 'sequence' is for the KL in the loss",
        ),
        (
            {"algorithm.kl_old.target": 0.01},
            "algorithm.kl_old.target: 0.01 can only be reached from",
        ),
        (
            {"algorithm.kl_old.coefficient": 1.0},
            "algorithm.kl_old.coefficient: 1 does nothing in the one update per batch",
        ),
        (
            {**RECOMPUTE, "algorithm.kl_old.coefficient": 1.0},
            "algorithm.kl_old.coefficient: 1 with algorithm.advantage.recompute",
        ),
        (
            {"algorithm.advantage.recompute": True},
            "algorithm.objective.weight: 'ppo_clip' acts on a ratio",
        ),
        (
            {**RECOMPUTE, "algorithm.kl.importance_ratio": "token"},
            "algorithm.kl.importance_ratio: 'token' with algorithm.advantage.recompute",
        ),
        (
            {**RECOMPUTE, **KL, "algorithm.kl.placement": "reward"},
            "algorithm.advantage.recompute: true estimates again",
        ),
        (
            {**RECOMPUTE, "algorithm.entropy.temperature": 0.1},
            "algorithm.advantage.recompute: true estimates again",
        ),
        (
            {"algorithm.entropy.target": 1.0},
            "algorithm.entropy.target: 1 can only be reached from a temperature",
        ),
        (
            {MASK + "below": 2.0, MASK + "above": 1.0},
            "algorithm.rollout_correction.mask_below: 2 is not below mask_above 1",
        ),
    ],
)
def test_one_message_with_field_value_and_remedy(changes: Mapping[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        evolve(RECIPE, changes)
    (line,) = str(error.value).splitlines()
    assert line.startswith(message)


def test_a_configuration_that_is_built_in_python_names_all_contradictions():
    with pytest.raises(ValidationError) as error:
        RunConfig(
            policy=PolicyConfig(num_mini_batches=3),
            generation=GenerationConfig(min_tokens=5000),
            trainer=TrainerConfig(prompts_per_step=8),
        )
    assert "policy.num_mini_batches: 3 does not divide" in str(error.value)
    assert "generation.min_tokens: 5000 is above" in str(error.value)


def test_the_command_line_leaves_them_to_be_reported_with_the_other_mistakes():
    config = parse(RECIPE, ["--policy.num_mini_batches", "3"]).config
    (line,) = contradictions(config)
    assert line.startswith("policy.num_mini_batches: 3 does not divide")
