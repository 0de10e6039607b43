"""Options without an effect: each row of the table warns in its setting, and in no other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from recipes.grpo_math import grpo_math
from recipes.run_recipe import run_recipe
from rlsys.config.command_line import all_fields, evolve, parse
from rlsys.config.hardware import Hardware
from rlsys.run.ineffective_options import TABLE, ineffective_options

CPU = Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
GPU = Hardware(cpus=16, memory_gib=128.0, gpus=2, gpu_memory_gib=80.0)
NETWORK = {
    "algorithm.advantage.name": "hierarchical",
    "algorithm.advantage.parameters": {"solver": "network"},
}
KL = {"algorithm.kl.coefficient": 0.1}
SEVERAL = {"policy.num_mini_batches": 2}
CRITIC = {"critic.enabled": True, "algorithm.advantage.name": "gae"}
VLLM = {"generation.engine": "vllm"}
MODEL_ALONE = {"reward.functions": [{"name": "model", "parameters": {"path": "somewhere"}}]}
PTX = {"ptx.coefficient": 0.5, "ptx.train": "synthetic"}

# option, value, a setting in which it has no effect, one in which it has, and the machine.
CASES: list[tuple[str, Any, Mapping[str, Any], Mapping[str, Any], Hardware]] = [
    (
        "algorithm.objective.ratio",
        "sequence",
        {"algorithm.objective.weight": "none"} | SEVERAL,
        SEVERAL,
        CPU,
    ),
    ("algorithm.objective.ratio", "sequence", {}, SEVERAL, CPU),
    ("algorithm.objective.weight", "cispo", {}, SEVERAL, CPU),
    ("algorithm.objective.parameters.clip_low", 0.1, {}, {"policy.epochs": 2}, CPU),
    ("algorithm.kl.kind", "k1", {}, KL, CPU),
    ("algorithm.kl.kind", "k1", KL | {"algorithm.kl.placement": "advantage"}, KL, CPU),
    ("algorithm.kl.direction", "forward", {}, KL, CPU),
    ("algorithm.kl.direction", "forward", KL | {"algorithm.kl.placement": "advantage"}, KL, CPU),
    ("algorithm.kl.placement", "reward", {}, KL, CPU),
    ("algorithm.kl.level", "sequence", {}, KL | {"algorithm.aggregation": "constant"}, CPU),
    ("algorithm.kl.importance_ratio", "token", {}, KL, CPU),
    ("algorithm.kl.horizon", 20.0, {}, KL | {"algorithm.kl.target": 0.1}, CPU),
    ("algorithm.kl.horizon", 20.0, KL, KL | {"algorithm.kl.target": 0.1}, CPU),
    ("reference.path", "tiny", {}, KL, CPU),
    ("reference.ranks", 1, {}, KL, CPU),
    ("reference.compute_dtype", "float32", {}, KL, CPU),
    ("reference.microbatch_tokens", 64, {}, KL, CPU),
    (
        "algorithm.entropy.learning_rate",
        0.1,
        {},
        {"algorithm.entropy.temperature": 0.1, "algorithm.entropy.target": 1.0},
        CPU,
    ),
    (
        "algorithm.rollout_correction.cap",
        3.0,
        {},
        {"algorithm.rollout_correction.level": "token"},
        CPU,
    ),
    (
        "algorithm.rollout_correction.mask_below",
        0.5,
        {},
        {"algorithm.rollout_correction.level": "token"},
        CPU,
    ),
    (
        "algorithm.rollout_correction.mask_above",
        2.0,
        {},
        {"algorithm.rollout_correction.level": "token"},
        CPU,
    ),
    (
        "algorithm.rollout_correction.sequence_kl",
        "k1",
        {},
        {"algorithm.rollout_correction.max_sequence_kl": 0.1},
        CPU,
    ),
    ("algorithm.advantage.auxiliary.width", 8, {}, NETWORK, CPU),
    ("algorithm.advantage.auxiliary.learning_rate", 0.1, {}, NETWORK, CPU),
    ("generation.kv_cache_gib", 2.0, {"generation.engine": "transformers"}, VLLM, CPU),
    ("generation.kv_cache_gib", 2.0, VLLM, {"cluster.address": "auto"}, GPU),
    ("generation.gpu_memory_utilization", 0.3, {"generation.engine": "transformers"}, VLLM, GPU),
    ("generation.gpu_memory_utilization", 0.3, VLLM, {"cluster.address": "auto"}, CPU),
    ("generation.compile", True, {"generation.engine": "transformers"}, VLLM, CPU),
    ("generation.tensor_parallel", 2, {"generation.engine": "transformers"}, VLLM, GPU),
    ("generation.max_model_tokens", 500, {"generation.engine": "transformers"}, VLLM, CPU),
    (
        "generation.engine_arguments.max_num_seqs",
        8,
        {"generation.engine": "transformers"},
        VLLM,
        CPU,
    ),
    (
        "generation.probe_every",
        5,
        {"generation.logprob_difference_tolerance": 0.0},
        {"generation.logprob_difference_tolerance": 0.1},
        CPU,
    ),
    ("sync.directory", "/weights", {}, {"sync.transport": "disk"}, CPU),
    ("model.lora.alpha", 16.0, {}, {"model.lora.rank": 8}, CPU),
    ("model.lora.target_modules", ["q_proj"], {}, {"model.lora.rank": 8}, CPU),
    ("policy.gpus_per_rank", 0.5, {}, {"cluster.address": "auto"}, CPU),
    ("policy.offload_optimizer", True, {}, {"cluster.address": "auto"}, CPU),
    (
        "generation.probe_every",
        10,
        {"generation.logprob_difference_tolerance": 0.0},
        {},
        CPU,
    ),
    (
        "sync.directory",
        "/shared/weights",
        {},
        {"sync.transport": "disk", "sync.directory": "/shared/weights"},
        CPU,
    ),
    ("model.lora.alpha", 8.0, {}, {"model.lora.rank": 4}, CPU),
    ("model.lora.target_modules", ["q_proj"], {}, {"model.lora.rank": 4}, CPU),
    ("reference.ranks", 1, KL | {"model.lora.rank": 4}, KL, CPU),
    ("policy.deepspeed.zero_stage", 2, {}, {"policy.backend": "deepspeed"}, CPU),
    ("policy.deepspeed.offload_weights", True, {}, {"policy.backend": "deepspeed"}, GPU),
    ("generation.gpus_per_worker", 0.5, {}, {"cluster.address": "auto"}, CPU),
    ("policy.threads_per_rank", 2, {}, {"policy.gpus_per_rank": 0.0}, GPU),
    ("policy.shared_prefix_packing", True, {"policy.packing": False}, {}, CPU),
    ("policy.shared_prefix_packing", True, {"model.attention": "flash_attention_2"}, {}, GPU),
    ("policy.optimizer.minimum_ratio", 0.1, {}, {"policy.optimizer.schedule": "cosine"}, CPU),
    ("critic.warmup_steps", 3, {}, CRITIC, CPU),
    ("critic.path", "tiny", {}, CRITIC, CPU),
    ("critic.value_clip", 0.1, CRITIC, CRITIC | SEVERAL, CPU),
    (
        "critic.optimizer.minimum_ratio",
        0.1,
        CRITIC,
        CRITIC | {"critic.optimizer.schedule": "cosine"},
        CPU,
    ),
    ("critic.offload_optimizer", True, CRITIC, CRITIC | {"cluster.address": "auto"}, CPU),
    ("data.synthetic.levels", [2], {"data.train": "a.jsonl"}, {}, CPU),
    ("data.synthetic.train_size", 9, {"data.train": "a.jsonl"}, {}, CPU),
    ("data.synthetic.eval_size", 9, {"data.train": "a.jsonl"}, {}, CPU),
    ("data.columns.problem", "question", {}, {"data.train": "a.jsonl"}, CPU),
    ("data.columns.id", "number", {}, {"data.eval": "a.jsonl"}, CPU),
    ("data.blank_rows", "refuse", {}, {"data.train": "a.jsonl"}, CPU),
    ("data.held_out", 0.2, {}, {"data.train": "a.jsonl"}, CPU),
    (
        "data.held_out",
        0.2,
        {"data.train": "a.jsonl", "data.eval": "b.jsonl"},
        {"data.train": "a.jsonl"},
        CPU,
    ),
    ("trainer.asynchronous.on_stale", "resample", {}, {"trainer.max_staleness": 1}, CPU),
    ("ptx.examples_per_step", 4, {}, PTX, CPU),
    ("ptx.train", "synthetic", {"ptx.eval": "off"}, {}, CPU),
    ("ptx.train", "synthetic", {"ptx.eval": "synthetic"}, {}, CPU),
    ("ptx.columns.text", "body", {}, PTX | {"ptx.train": "texts.jsonl"}, CPU),
    ("ptx.columns.text", "body", PTX, PTX | {"ptx.eval": "texts.jsonl"}, CPU),
    ("ptx.held_out", 0.2, {}, PTX, CPU),
    (
        "ptx.held_out",
        0.2,
        PTX | {"ptx.train": "texts.jsonl", "ptx.eval": "off"},
        PTX | {"ptx.train": "texts.jsonl"},
        CPU,
    ),
    ("ptx.max_tokens", 64, {}, {"ptx.eval": "synthetic"}, CPU),
    ("ptx.eval", "synthetic", {"trainer.evaluation.every": 0}, {}, CPU),
    ("ptx.eval_limit", 10, {}, PTX, CPU),
    (
        "trainer.evaluation.every",
        5,
        {"data.eval": "off"},
        {"data.eval": "off", "ptx.eval": "synthetic"},
        CPU,
    ),
    ("data.eval_limit", 9, {"data.eval": "off"}, {}, CPU),
    ("trainer.evaluation.every", 5, {"data.eval": "off"}, {}, CPU),
    ("trainer.checkpoints.keep", 3, {"trainer.checkpoints.every": 0}, {}, CPU),
    ("trainer.checkpoints.asynchronous", True, {"trainer.checkpoints.every": 0}, {}, CPU),
    (
        "trainer.checkpoints.asynchronous",
        True,
        {"trainer.checkpoints.every": 60, "trainer.steps": 60},
        {"trainer.checkpoints.every": 59, "trainer.steps": 60},
        CPU,
    ),
    ("trainer.evaluation.samples_per_prompt", 4, {"trainer.evaluation.every": 0}, {}, CPU),
    (
        "trainer.evaluation.temperature",
        0.6,
        {"trainer.evaluation.every": 0},
        {"trainer.evaluation.samples_per_prompt": 4},
        CPU,
    ),
    ("trainer.evaluation.temperature", 0.6, {}, {"trainer.evaluation.samples_per_prompt": 4}, CPU),
    ("trainer.evaluation.pass_at", [1], {}, {"trainer.evaluation.samples_per_prompt": 4}, CPU),
    ("reward.processes", 2, MODEL_ALONE, {}, CPU),
    ("reward.memory_gb", 2.0, MODEL_ALONE, {}, CPU),
    ("reward.timeout_s", 3.0, MODEL_ALONE, {}, CPU),
    ("trainer.evaluation.samples_per_prompt", 4, MODEL_ALONE, {}, CPU),
    ("diagnostics.gradient_every", 3, {}, {"diagnostics.gradient": True}, CPU),
    ("reward.workers", 2, MODEL_ALONE, {}, CPU),
    ("cluster.placement", "SPREAD", {}, {"cluster.address": "auto"}, CPU),
    ("cluster.recovery_timeout_s", 60.0, {}, {"cluster.address": "auto"}, CPU),
    ("cluster.object_store_gib", 2.0, {"cluster.address": "auto"}, {}, CPU),
]


def warned(changes: Mapping[str, Any], explicit: set[str], hardware: Hardware) -> list[str]:
    return list(ineffective_options(evolve(grpo_math(CPU), changes), explicit, hardware))


@pytest.mark.parametrize(("option", "value", "nothing", "something", "hardware"), CASES)
def test_a_row_fires_in_its_setting_alone(
    option: str,
    value: Any,
    nothing: Mapping[str, Any],
    something: Mapping[str, Any],
    hardware: Hardware,
):
    (warning,) = warned({**nothing, option: value}, {option}, hardware)
    assert warning.startswith(f"{option}: {value} has no effect because ")
    assert warned({**something, option: value}, {option}, hardware) == []


def test_every_option_of_the_table_has_a_case():
    tried = {option for option, *_ in CASES}
    for row in TABLE:
        for option in row.options:
            assert any(name == option or name.startswith(option) for name in tried), option


def test_the_table_names_fields_that_exist():
    names = [name for name, _ in all_fields()]
    for option in (option for row in TABLE for option in row.options):
        assert any(name == option or f"{name}.".startswith(option) for name in names), option


def test_defaults_never_warn():
    for recipe in (grpo_math(CPU), grpo_math(GPU)):
        for hardware in (CPU, GPU):
            assert list(ineffective_options(recipe, (), hardware)) == []


def test_a_value_that_asks_for_nothing_does_not_warn():
    assert warned({"policy.offload_optimizer": False}, {"policy.offload_optimizer"}, CPU) == []
    nothing = {"generation.engine": "transformers", "generation.tensor_parallel": 1}
    assert warned(nothing, {"generation.tensor_parallel"}, CPU) == []


def test_a_power_of_zero_ignores_the_ratio_too():
    """A weight that ignores the ratio is detected by calling it, so plug-ins are covered too."""
    changes = {
        "algorithm.objective.weight": "power",
        "algorithm.objective.parameters": {"q": 0.0},
        "algorithm.objective.ratio": "prefix",
        "policy.num_mini_batches": 2,
    }
    (warning,) = warned(changes, {"algorithm.objective.ratio"}, CPU)
    assert "does not read the ratio" in warning


def test_parameters_given_as_a_whole_are_named_one_by_one():
    changes = {"algorithm.objective.parameters": {"clip_low": 0.1, "clip_high": 0.3}}
    warnings = warned(changes, {"algorithm.objective.parameters"}, CPU)
    assert [line.split(":")[0] for line in warnings] == [
        "algorithm.objective.parameters.clip_high",
        "algorithm.objective.parameters.clip_low",
    ]


def test_the_command_line_says_it(capsys: pytest.CaptureFixture[str]):
    flags = ["--model.path", "tiny", "--dry-run", "--algorithm.kl.kind", "k1"]
    with pytest.raises(SystemExit) as exit_:
        run_recipe(grpo_math, flags)
    assert exit_.value.code == 0
    line = "warning: algorithm.kl.kind: k1 has no effect because algorithm.kl.coefficient is 0."
    assert capsys.readouterr().out.count(line) == 1
    assert "algorithm.kl.kind" not in parse(grpo_math(CPU), flags[:2]).explicit
