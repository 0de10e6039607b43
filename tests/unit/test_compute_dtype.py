"""The choice that `auto` precision becomes, and how it is reported."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from recipes.grpo_math import grpo_math
from rlsys.config import GenerationConfig, PolicyConfig, RunConfig
from rlsys.config.command_line import load_yaml, parse
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.models.loading import mlp_shape
from rlsys.run import compute_dtype
from rlsys.run.compute_dtype import Machine, ProductSpeed, cached_product_speed, choose_dtypes
from rlsys.run.directory import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
CPU = Hardware(
    cpus=2,
    memory_gib=24.0,
    gpus=0,
    gpu_memory_gib=0.0,
    cpu_model="Some CPU",
    bfloat16_instructions=("avx512_bf16",),
)
GPU = replace(CPU, gpus=1, gpu_memory_gib=80.0, compute_capability=(8, 0))
FAST, SLOW = ProductSpeed(float32=100, bfloat16=300), ProductSpeed(float32=150, bfloat16=17)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "n_inner": None}))
    return tmp_path


def chosen(config: RunConfig, hardware: Hardware, model: Path, speed: ProductSpeed):
    return choose_dtypes(config, hardware, model, measure=lambda *_: speed)


def dtypes(config: RunConfig) -> tuple[str, str]:
    return config.generation.dtype, config.policy.compute_dtype


@pytest.mark.parametrize(
    ("hardware", "speed", "expected"),
    [
        (CPU, FAST, "bfloat16"),
        (CPU, SLOW, "float32"),  # emulated, whatever the flags say
        (CPU, ProductSpeed(float32=100, bfloat16=105), "float32"),  # no gain worth the rounding
        (replace(CPU, bfloat16_instructions=()), FAST, "float32"),
        (GPU, SLOW, "bfloat16"),
        (replace(GPU, compute_capability=(7, 5)), FAST, "float32"),
    ],
)
def test_auto_becomes_what_the_machine_is_fast_in(
    hardware: Hardware, speed: ProductSpeed, expected: str, model: Path
):
    default = RunConfig()
    assert dtypes(default) == ("auto", "auto")
    choice = chosen(default, hardware, model, speed)
    assert dtypes(choice.config) == (expected, expected)
    (reason,) = choice.reasons
    assert reason.startswith(f"generation.dtype, policy.compute_dtype: auto -> {expected} (")
    assert choice.warnings == ()


def test_each_role_computes_on_its_own_device(model: Path):
    config = RunConfig(generation=GenerationConfig(gpus_per_worker=0))
    choice = chosen(config, GPU, model, SLOW)
    assert dtypes(choice.config) == ("float32", "bfloat16")
    assert [reason.partition(":")[0] for reason in choice.reasons] == [
        "generation.dtype",
        "policy.compute_dtype",
    ]


def machine(name: str, speed: ProductSpeed, *parts: str) -> Machine:
    return Machine(
        name=name, hardware=CPU, speed=speed, gpu_parts=frozenset(), cpu_parts=frozenset(parts)
    )


def test_nodes_of_a_cluster_agree_on_a_precision_or_compute_in_float32(model: Path):
    both = ("policy", "generation")
    config = RunConfig()

    agreed = choose_dtypes(
        config, CPU, model, machines=[machine("a", FAST, *both), machine("b", FAST, *both)]
    )
    assert dtypes(agreed.config) == ("bfloat16", "bfloat16")
    (reason,) = agreed.reasons
    assert reason.startswith("generation.dtype, policy.compute_dtype: auto -> bfloat16 (a, b: ")

    # Each role is decided by the nodes on which it may be.
    machines = [machine("a", FAST, *both), machine("b", SLOW, "policy")]
    mixed = choose_dtypes(config, CPU, model, machines=machines)
    assert dtypes(mixed.config) == ("bfloat16", "float32")
    (differ,) = [reason for reason in mixed.reasons if reason.startswith("policy")]
    assert "the nodes differ" in differ
    assert "a: bfloat16, Some CPU" in differ
    assert "b: float32, Some CPU" in differ


def test_a_driver_without_a_gpu_chooses_for_the_gpus_of_the_cluster(model: Path):
    on_gpu = Machine(
        name="a", hardware=GPU, speed=SLOW, gpu_parts=frozenset({"policy"}), cpu_parts=frozenset()
    )
    machines = [on_gpu, machine("b", SLOW, "generation")]
    choice = choose_dtypes(RunConfig(), CPU, model, machines=machines)
    assert dtypes(choice.config) == ("float32", "bfloat16")


def test_explicit_values_stay_and_slow_ones_give_one_warning_with_the_ratio(model: Path):
    config = RunConfig(
        generation=GenerationConfig(dtype="bfloat16"),
        policy=PolicyConfig(compute_dtype="bfloat16"),
    )
    choice = chosen(config, CPU, model, SLOW)
    assert choice.config is config
    assert choice.reasons == ()
    (warning,) = choice.warnings
    assert "17 GFLOP/s per core in bfloat16 and 150 in float32, 0.11 times as fast" in warning
    assert chosen(config, CPU, model, FAST).warnings == ()
    assert chosen(config, GPU, model, SLOW).warnings == ()


def test_the_measurement_is_cached_by_what_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path))
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    calls: list[tuple[int, int]] = []

    def measure(shape: tuple[int, int]) -> ProductSpeed:
        calls.append(shape)
        return FAST

    monkeypatch.setattr(compute_dtype, "measure_products", measure)
    assert cached_product_speed(CPU, (64, 256)) == FAST
    assert cached_product_speed(CPU, (64, 256)) == FAST
    assert len(calls) == 1

    cached_product_speed(replace(CPU, cpu_model="Another"), (64, 256))
    monkeypatch.setattr(compute_dtype.torch, "__version__", "3.0")
    cached_product_speed(CPU, (64, 256))
    cached_product_speed(CPU, (128, 256))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    cached_product_speed(CPU, (64, 256))
    assert len(calls) == 5

    for file in (tmp_path / "product_speed").iterdir():
        file.write_text("{")  # damaged
    cached_product_speed(CPU, (64, 256))
    assert len(calls) == 6


EMULATED = """
import json
from rlsys.config.hardware import detect_hardware
from rlsys.run.compute_dtype import measure_products
speed = measure_products((256, 512))
print(json.dumps([detect_hardware().bfloat16_instructions, speed.float32, speed.bfloat16]))
"""


def test_an_avx2_cpu_is_measured_to_be_slower_in_bfloat16(monkeypatch: pytest.MonkeyPatch):
    """Measure in an environment that emulates AVX2, on any x86 CPU."""
    if not {"avx2", "sse4_2"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("not an x86 CPU with AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    done = subprocess.run(
        [sys.executable, "-c", EMULATED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    instructions, float32, bfloat16 = json.loads(done.stdout)
    assert instructions == []
    assert 0 < bfloat16 < float32


def test_config_yaml_holds_the_choice_and_why_and_a_resumed_run_keeps_both(
    tmp_path: Path, model: Path
):
    choice = chosen(grpo_math(CPU), CPU, model, FAST)
    directory = RunDirectory(tmp_path / "run")
    directory.create(choice.config, choice.reasons)
    text = directory.config.read_text()
    assert "auto -> bfloat16 (Some CPU, avx512_bf16" in text.splitlines()[0]
    assert yaml.safe_load(text)["policy"]["compute_dtype"] == "bfloat16"
    assert load_yaml(directory.config) == choice.config

    flags = ["--run.directory", str(directory.path), "--resume"]
    resumed = parse(grpo_math(detect_hardware()), flags).config
    elsewhere = chosen(resumed, CPU, model, SLOW)  # on a CPU where it is slow
    assert dtypes(elsewhere.config) == ("bfloat16", "bfloat16")
    directory.create(elsewhere.config, elsewhere.reasons)
    assert directory.config.read_text().splitlines()[0] == text.splitlines()[0]


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"hidden_size": 576, "intermediate_size": 1536}, (576, 1536)),
        ({"n_embd": 768, "n_inner": None}, (768, 3072)),
        ({"text_config": {"hidden_size": 64, "intermediate_size": [128, 256]}}, (64, 256)),
    ],
)
def test_the_shape_of_a_models_products(
    config: dict[str, object], shape: tuple[int, int], tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert mlp_shape(tmp_path) == shape


def test_the_recipe_takes_fewer_steps_where_a_step_takes_long_and_says_so():
    slow, fast = grpo_math(replace(CPU, bfloat16_instructions=())), grpo_math(CPU)
    assert (slow.trainer.steps, fast.trainer.steps) == (24, 60)
    assert slow.run.note is not None
    assert "24 steps instead of 60" in slow.run.note
    assert fast.run.note is None
    assert slow.generation.cpus_per_worker == 1
    # Policy and engine take turns on a single core.
    assert grpo_math(replace(CPU, cpus=1)).generation.cpus_per_worker == 0
    many = replace(CPU, bfloat16_instructions=(), cpus=16)
    assert grpo_math(many).trainer.steps == 60
