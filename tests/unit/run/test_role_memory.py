"""The memory in the plan of a run: that of `rlsys.plan`, or a rough sum where it has no formula."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.plan.gpus import GIB, Gpu
from rlsys.plan.run_memory import Machine, plan_run
from rlsys.plan.shapes import shape_of_model
from rlsys.run.model_checks import ModelDirectories
from rlsys.run.role_memory import planned_memory, rough_memory, training_bytes

CPU = Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
ROUGH = {
    "model.embed_tokens.weight": (100, 10),
    "model.layers.0.mlp.weight": (40, 10),
    "model.layers.1.mlp.experts.0.weight": (30, 10),
    "model.layers.1.mlp.experts.1.weight": (30, 10),
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    facts = {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "intermediate_size": 8192,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(facts))
    return tmp_path


def config(**changes: object) -> RunConfig:
    resolved = {"policy.compute_dtype": "bfloat16", "generation.dtype": "bfloat16"}
    return evolve(RunConfig(), {**resolved, **changes})


@pytest.mark.parametrize("gpus", [0, 2])
def test_covered_runs_have_the_peaks_of_the_planner(llama: Path, gpus: int):
    larger = llama / "larger"
    larger.mkdir()
    facts = json.loads((llama / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps(facts | {"num_hidden_layers": 16}))
    changes = {"policy.ranks": 2, "algorithm.kl.coefficient": 0.1, "reference.path": "org/larger"}
    settings = config(**changes)
    hardware = Hardware(cpus=2, memory_gib=24.0, gpus=gpus, gpu_memory_gib=80.0 if gpus else 0.0)
    found = planned_memory(
        settings, hardware, ModelDirectories(policy=llama, reference=larger, critic=llama)
    )
    assert found.keys() == {"policy", "reference"}

    gpu = Gpu(name="any", memory_gib=80.0) if gpus else None
    machine = Machine(gpu=gpu, gpus=gpus)
    shape = shape_of_model(str(llama))
    memory = plan_run(settings, machine, shape, lambda _: shape_of_model(str(larger)))
    for role in memory.roles:
        for peak in role.peaks:
            size = peak.device.device_bytes if gpus else peak.host.host_bytes
            assert f"{peak.phase} {size / GIB:.2f}" in found[role.role]


@pytest.mark.parametrize(
    "changes",
    [
        {"policy.frozen": ["model.layers.0.*"]},
        {"model.lora.rank": 4},
        {"policy.backend": "deepspeed"},
    ],
)
def test_what_the_planner_does_not_cover_has_a_rough_sum(llama: Path, changes: dict):
    assert planned_memory(config(**changes), CPU, ModelDirectories.same(llama)) == {}


def test_other_architectures_have_a_rough_sum(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert planned_memory(config(), CPU, ModelDirectories.same(tmp_path)) == {}


def test_frozen_parameters_have_no_gradients_and_no_moments():
    parameters, unsharded = 2000, 1000 + 600
    role = config().policy
    assert training_bytes(role, ROUGH) == 16 * parameters + 2 * unsharded
    role = config(**{"policy.frozen": ["model.embed_tokens.*", "model.layers.0.*"]}).policy
    assert training_bytes(role, ROUGH) == 4 * parameters + 12 * 600 + 2 * unsharded


def test_a_rank_never_holds_the_whole_model_in_the_compute_dtype():
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        role = config(**{"policy.ranks": 4, "policy.compute_dtype": dtype}).policy
        assert training_bytes(role, ROUGH) == 16 * 2000 / 4 + size * (1000 + 2 * 600)


def test_zero_stages():
    for stage, expected in ((1, 3 + 4 + 2), (2, 3 + 1 + 2), (3, 3 + 1 + 0.5)):
        changes = {"policy.backend": "deepspeed", "policy.deepspeed.zero_stage": stage}
        role = config(**changes, **{"policy.ranks": 4}).policy
        assert training_bytes(role, ROUGH) == expected * 2000


def test_the_text_names_the_trained_parameters(tmp_path: Path):
    save_file(
        {name: torch.zeros(1000 * rows, columns) for name, (rows, columns) in ROUGH.items()},
        tmp_path / "model.safetensors",
    )
    settings = config(**{"policy.frozen": ["model.embed_tokens.*"]})
    assert rough_memory(settings.policy, settings, tmp_path) == (
        "0.02 GiB weights, gradients and Adam of the 1.0 M trained parameters (bfloat16), "
        "and activations"
    )
