"""Fields that do not fit this machine or its installed packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from recipes.grpo_math import grpo_math
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.run import machine_checks
from rlsys.run.machine_checks import machine_mistakes
from workers.weight_sync.transports.disk import DiskTransport

CPU = Hardware(cpus=8, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
GPU = Hardware(cpus=16, memory_gib=128.0, gpus=2, gpu_memory_gib=80.0)
DEEPSPEED = {"policy.backend": "deepspeed"}


def mistakes(changes: Mapping[str, Any], hardware: Hardware = CPU) -> list[str]:
    return list(machine_mistakes(evolve(grpo_math(CPU), changes), hardware))


@pytest.mark.parametrize("hardware", [CPU, GPU])
def test_the_recipe_of_a_machine_fits_it(hardware: Hardware):
    assert list(machine_mistakes(grpo_math(hardware), hardware)) == []


@pytest.mark.parametrize(
    ("changes", "hardware", "message"),
    [
        (
            {"model.attention": "flash_attention_2"},
            CPU,
            "model.attention: 'flash_attention_2' needs a GPU, and this machine has no GPU. "
            "Choose sdpa",
        ),
        (
            {"model.attention": "flex_attention"},
            CPU,
            "model.attention: 'flex_attention' needs a GPU",
        ),
        (
            {"model.attention": "flex_attention", "policy.gpus_per_rank": 0.0},
            GPU,
            "model.attention: 'flex_attention' needs a GPU, and policy.gpus_per_",
        ),
        (
            {**DEEPSPEED, "policy.deepspeed.offload_weights": True},
            CPU,
            "policy.deepspeed.offload_weights: true moves weights from a GPU to its host, and "
            "this machine has no GPU. Set it to false",
        ),
        (
            {
                **DEEPSPEED,
                "policy.deepspeed.offload_weights": True,
                "policy.gpus_per_rank": 0.0,
            },
            GPU,
            "policy.deepspeed.offload_weights: true moves weights from a GPU to its host, and "
            "policy.gpus_per_rank is 0",
        ),
        (
            {"generation.tensor_parallel": 2},
            CPU,
            "generation.tensor_parallel: 2 splits a model over GPUs, and this machine has none. "
            "Set it to 1",
        ),
        (
            {"generation.tensor_parallel": 2, "generation.gpus_per_worker": 0.5},
            GPU,
            "generation.gpus_per_worker: 0.5 with generation.tensor_parallel 2",
        ),
        (
            {"generation.engine_arguments": {"dtype": "float16"}},
            CPU,
            "generation.engine_arguments.dtype: not to be set here. Set generation.dtype.",
        ),
        (
            {"generation.engine_arguments.data_parallel_size": 2},
            CPU,
            "generation.engine_arguments.data_parallel_size: not to be set here. Each engine is",
        ),
        (
            {"generation.engine_arguments.enable_lora": True},
            CPU,
            "generation.engine_arguments.enable_lora: not to be set here. Each weight sync",
        ),
        (
            {"generation.engine_arguments.max_num_sequences": 64},
            CPU,
            "generation.engine_arguments.max_num_sequences: the installed vllm has no such "
            "argument. Did you mean max_num_seqs",
        ),
        (
            {"generation.kv_cache_gib": 1.4},
            CPU,
            "generation.kv_cache_gib: vllm takes whole GiB on a CPU, not 1.4. Give 1.",
        ),
        (
            {"generation.kv_cache_gib": 16.0, "generation.workers": 2},
            CPU,
            "generation.kv_cache_gib: 16 for each of 2 workers",
        ),
        (
            {"policy.node_label": "pool=train"},
            CPU,
            "policy.node_label: 'pool=train' is a label of nodes of a cluster, and this run starts",
        ),
        (
            {"reward.node_label": "pool=cpu"},
            CPU,
            "reward.node_label: 'pool=cpu' is a label",
        ),
        (
            {"cluster.object_store_gib": 100.0},
            CPU,
            "cluster.object_store_gib: 100 is more than the 24 GiB",
        ),
        (
            {"policy.ranks": 9, "generation.samples_per_prompt": 16},
            CPU,
            "policy.ranks, generation.workers: 9 ranks and 1 workers need 10 CPUs",
        ),
        (
            {"policy.threads_per_rank": 9},
            CPU,
            "policy.threads_per_rank: 9 threads for the 8 CPUs of this machine. Lower it",
        ),
    ],
)
def test_one_message_with_field_value_and_remedy(
    changes: Mapping[str, Any], hardware: Hardware, message: str
):
    (mistake,) = mistakes(changes, hardware)
    assert mistake.startswith(message)


def test_flex_attention_is_fine_on_a_gpu_and_flash_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
):
    assert mistakes({"model.attention": "flex_attention"}, GPU) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (mistake,) = mistakes({"model.attention": "flash_attention_2"}, GPU)
    assert mistake.startswith("model.attention: 'flash_attention_2' needs the package flash-attn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert mistakes({"model.attention": "flash_attention_2"}, GPU) == []


def test_deepspeed_must_be_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine_checks, "_is_installed", lambda *names: names != ("deepspeed",))
    (mistake,) = mistakes(DEEPSPEED)
    assert mistake.startswith("policy.backend: 'deepspeed' is not installed. Install it")


def test_on_another_cluster_nothing_is_assumed_of_its_machines():
    changes = {
        "cluster.address": "auto",
        "model.attention": "flash_attention_2",
        "generation.tensor_parallel": 2,
        "cluster.object_store_gib": 100.0,
    }
    assert mistakes(changes) == []


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine_checks, "_is_installed", lambda *packages: False)
    (mistake,) = mistakes({})
    assert (
        mistake == "generation.engine: 'vllm' is not installed. Install it, or choose transformers."
    )
    assert mistakes({"generation.engine": "transformers"}) == []


def test_compilation_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(machine_checks.shutil, "which", lambda name: None)
    (mistake,) = mistakes({"generation.compile": True})
    assert mistake.startswith("generation.compile: true needs a C++ compiler")
    monkeypatch.setenv("CXX", "/opt/c++")
    assert mistakes({"generation.compile": True}) == []


def test_a_directory_of_weights_holds_nothing_else(tmp_path: Path):
    def of(directory: Path) -> list[str]:
        return mistakes({"sync.transport": "disk", "sync.directory": str(directory)})

    assert of(tmp_path) == of(tmp_path / "new") == []
    (tmp_path / "of_another_program").touch()
    (refused,) = of(tmp_path)
    assert refused.startswith("sync.directory:")
    assert "holds other files" in refused
    (refused,) = of(tmp_path / "of_another_program")
    assert "is not a directory" in refused
    # A later run takes the directory over.
    DiskTransport(str(tmp_path / "earlier")).write(0, iter(()), keep=())
    assert of(tmp_path / "earlier") == []
    assert mistakes({"sync.directory": str(tmp_path)}) == []  # nothing is written there
