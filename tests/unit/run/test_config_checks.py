"""Fields that do not fit each other, the machine or what is installed on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import pytest

from recipes.grpo_math import grpo_math
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.run import config_checks
from rlsys.run.config_checks import field_problems, field_warnings

CPU = Hardware(cpus=8, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
GPU = Hardware(cpus=16, memory_gib=128.0, gpus=2, gpu_memory_gib=80.0)


def problems(changes: Mapping[str, Any], hardware: Hardware = CPU) -> list[str]:
    return list(field_problems(evolve(grpo_math(CPU), changes), hardware))


@pytest.mark.parametrize("hardware", [CPU, GPU])
def test_the_recipe_of_a_machine_has_no_problem(hardware: Hardware):
    assert list(field_problems(grpo_math(hardware), hardware)) == []
    assert list(field_warnings(grpo_math(hardware))) == []


@pytest.mark.parametrize(
    ("changes", "hardware", "message"),
    [
        ({"model.attention": "flash_attention_2"}, CPU, "model.attention: 'flash_attention_2' needs a GPU, and this machine has no GPU. Choose sdpa"),
        ({"model.attention": "flex_attention"}, CPU, "model.attention: 'flex_attention' needs a GPU"),
        ({"model.attention": "flex_attention", "policy.gpus_per_rank": 0.0}, GPU, "model.attention: 'flex_attention' needs a GPU, and policy.gpus_per_"),
        ({"generation.tensor_parallel": 2}, CPU, "generation.tensor_parallel: 2 splits a model over GPUs, and this machine has none. Set it to 1"),
        ({"generation.tensor_parallel": 2, "generation.gpus_per_worker": 0.5}, GPU, "generation.gpus_per_worker: 0.5 with generation.tensor_parallel 2"),
        ({"generation.kv_cache_gib": 1.4}, CPU, "generation.kv_cache_gib: vLLM takes whole GiB on a CPU, not 1.4. Give 1."),
        ({"generation.kv_cache_gib": 16.0, "generation.workers": 2}, CPU, "generation.kv_cache_gib: 16 for each of 2 workers"),
        ({"cluster.object_store_gib": 100.0}, CPU, "cluster.object_store_gib: 100 is more than the 24 GiB"),
        ({"reward.timeout_s": 1e20}, CPU, "reward.timeout_s: 1e+20 is more than a day"),
        ({"reward.memory_gb": 1e20}, CPU, "reward.memory_gb: 1e+20 is no limit"),
        ({"policy.threads_per_rank": 9}, CPU, "policy.threads_per_rank: 9 threads for the 8 CPUs of this machine. Lower it"),
        ({"generation.workers": 9}, GPU, "generation.workers: 9 workers share the 8 prompts"),
        ({"policy.optimizer.learning_rate": 0.5, "policy.optimizer.weight_decay": 2.0}, CPU, "policy.optimizer.weight_decay: 2 times"),
        ({"reward.functions": [{"name": "math", "weight": 0.0}]}, CPU, "reward.functions: every weight is 0"),
    ],
)  # fmt: skip
def test_one_message_with_field_value_and_remedy(
    changes: Mapping[str, Any], hardware: Hardware, message: str
):
    (problem,) = problems(changes, hardware)
    assert problem.startswith(message)


def test_flex_attention_is_fine_on_a_gpu_and_flash_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
):
    assert problems({"model.attention": "flex_attention"}, GPU) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = problems({"model.attention": "flash_attention_2"}, GPU)
    assert problem.startswith("model.attention: 'flash_attention_2' needs the package flash-attn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert problems({"model.attention": "flash_attention_2"}, GPU) == []


def test_on_another_cluster_nothing_is_assumed_of_its_machines():
    changes = {
        "cluster.address": "auto",
        "model.attention": "flash_attention_2",
        "generation.tensor_parallel": 2,
        "cluster.object_store_gib": 100.0,
    }
    assert problems(changes) == []


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(config_checks, "_is_installed", lambda *packages: False)
    (problem,) = problems({})
    assert (
        problem == "generation.engine: 'vllm' is not installed. Install it, or choose transformers."
    )
    assert problems({"generation.engine": "transformers"}) == []


def test_compilation_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(config_checks.shutil, "which", lambda name: None)
    (problem,) = problems({"generation.compile": True})
    assert problem.startswith("generation.compile: true needs a C++ compiler")
    monkeypatch.setenv("CXX", "/opt/c++")
    assert problems({"generation.compile": True}) == []


def test_a_warm_up_that_never_ends_is_a_warning():
    config = evolve(grpo_math(CPU), {"policy.optimizer.warmup_steps": 120})
    (warning,) = field_warnings(config)
    assert warning.startswith(
        "policy.optimizer.warmup_steps: 120 is above trainer.steps 60, so the learning rate ends at 5e-06"
    )
    assert not list(field_warnings(evolve(config, {"trainer.steps": 120})))
