"""`python -m rlsys.plan`: its output, its proposals, and what it refuses."""

import json
from pathlib import Path

import pytest

from recipes.grpo_math import on_gpus
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.plan.__main__ import main
from rlsys.plan.gpus import GIB, gpu_called
from rlsys.plan.proposals import GPU_WORKLOAD, MARGIN, propose
from rlsys.plan.run_memory import Machine, plan_run
from rlsys.plan.shapes import NAMED_SHAPES, shape_of_model

SIZES = [
    *("--hidden", "8", "--layers", "2", "--heads", "2", "--kv-heads", "1"),
    *("--intermediate", "16", "--vocabulary", "32", "--tied"),
]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    code = main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["fits"] else 1)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_json_has_every_phase_and_says_what_was_checked(capsys: pytest.CaptureFixture[str]):
    found = answer(
        capsys, "--size", "1.5b", "--policy.ranks", "2", "--cluster.object_store_gib", "9"
    )
    policy = found["roles"]["policy"]
    assert policy["parameters"] == 1_543_714_304
    assert list(policy["phases"]) == ["set-up", "log-probs", "update", "sync", "checkpoint"]
    assert found["gpu"] is None
    assert any("never checked" in line for line in found["checked"])

    parts = policy["phases"]["checkpoint"]["host"]["parts_gib"]
    assert parts["masters"] == pytest.approx(4 * 1_543_714_304 / 2 / GIB, abs=1e-3)
    for phase in policy["phases"].values():
        assert phase["host"]["gib"] == pytest.approx(
            sum(phase["host"]["parts_gib"].values()), abs=0.01
        )


def test_a_run_with_checkpoints_in_the_background_needs_more_of_its_host(
    capsys: pytest.CaptureFixture[str],
):
    """From the first one on, in all phases: also while the ranks rest."""
    plain = answer(capsys, *SIZES)
    found = answer(capsys, *SIZES, "--trainer.checkpoints.asynchronous", "true")
    phases = found["roles"]["policy"]["phases"]
    for name in ("log-probs", "update", "sync", "checkpoint"):
        assert "copy for checkpoints" in phases[name]["host"]["parts_gib"], name
    assert phases["set-up"] == plain["roles"]["policy"]["phases"]["set-up"]


def test_sizes_given_by_flags_are_those_of_the_formulas(capsys: pytest.CaptureFixture[str]):
    assert answer(capsys, *SIZES)["roles"]["policy"]["parameters"] == 1448


def test_a_config_json_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    facts = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "vocab_size": 32,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(facts))
    assert shape_of_model(str(file)) == shape_of_model(str(tmp_path))
    assert shape_of_model(str(file)).file_bytes == 4
    found = answer(capsys, "--model.path", str(tmp_path))
    assert found["roles"]["policy"]["parameters"] == 1448


def test_a_reference_a_critic_and_a_reward_model_are_roles_of_their_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 32, '
        '"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}'
    )
    found = answer(
        capsys,
        *("--model.path", str(tmp_path), "--preset", "ppo"),
        *("--algorithm.kl.coefficient", "0.1"),
        *("--reward.functions", f"[{{name: model, parameters: {{path: {tmp_path}}}}}]"),
    )
    assert list(found["roles"]) == ["policy", "reference", "critic", "reward model"]
    # 1448 with a head of one number for each of 8, instead of an LM head of its own (256)
    assert found["roles"]["critic"]["parameters"] == 1448 + 8
    assert found["roles"]["reference"]["parameters"] == 1448 + 256
    # A frozen model has no update and no checkpoint.
    assert list(found["roles"]["reference"]["phases"]) == ["set-up", "log-probs"]


def test_processes_on_a_gpu_add_up(capsys: pytest.CaptureFixture[str]):
    fields = [
        *("--size", "1.5b", "--gpu", "h200", "--gpus", "1", "--cluster.object_store_gib", "9"),
        *("--policy.gpus_per_rank", "0.5", "--generation.gpus_per_worker", "0.5"),
        *("--generation.gpu_memory_utilization", "0.3"),
    ]
    alone = answer(capsys, *fields)
    both = answer(capsys, *fields, "--algorithm.kl.coefficient", "0.1")
    assert alone["shared_gpus"]
    assert alone["gpu_of_engine_gib"] == alone["fullest_gpu_of_ranks_gib"]
    # Set-up holds the whole reference in float32, and the allocator keeps that.
    more = both["fullest_gpu_of_ranks_gib"] - alone["fullest_gpu_of_ranks_gib"]
    assert more > 4 * 1_543_714_304 / GIB


def test_a_store_that_is_too_small_is_a_problem(capsys: pytest.CaptureFixture[str]):
    found = answer(capsys, "--size", "7b", "--gpu", "h200", "--gpus", "8", "--policy.ranks", "4")
    assert any(line.startswith("cluster.object_store_gib: 1 ") for line in found["problems"])


def test_stale_training_keeps_versions_in_the_store(capsys: pytest.CaptureFixture[str]):
    fields = ["--size", "1.5b", "--cluster.object_store_gib", "20"]
    stale = ["--trainer.max_staleness", "2"]
    alone = answer(capsys, *fields)["object_store_gib"]
    assert answer(capsys, *fields, *stale)["object_store_gib"] == pytest.approx(3 * alone, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.path", "nobody/nothing"], "model.path: no config.json of 'nobody/nothing'"),
        (["--size", "7b", "--hidden", "8"], "--size: the model is named in more than one way"),
        (["--hidden", "8"], "--layers, --heads, --intermediate, --vocabulary: a shape needs"),
        ([*SIZES, "--head-dim", "0"], "head_dim: 0 is not above 0"),
        (["--tied"], "--tied: it belongs to the sizes"),
        (["--size", "7b", "--gpu", "abacus"], "--gpu: 'abacus' is none of"),
        (["--size", "7b", "--gpu", "h100", "--gpus", "0"], "--gpus: 0 is not above 0"),
        (["--size", "7b", "--propose"], "--propose: it needs a type of GPU"),
        (["--size", "7b", "--dry-run"], "--dry-run: the plan starts nothing"),
        (["--size", "7b", "--policy.rank", "2"], "policy.rank"),
        (["--size", "7b", "--policy.packing", "false"], "policy.packing: the plan does not cover"),
        (["--size", "7b", "--policy.backend", "deepspeed"], "policy.backend: the plan does not"),
        (["--size", "7b", "--model.lora.rank", "8"], "model.lora.rank: the plan does not cover 8"),
        (["--size", "7b", "--policy.frozen", "[lm_head.*]"], "policy.frozen: the plan does not"),
        (["--size", "7b", "--model.attention", "eager"], "model.attention: the plan does not"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    assert expected in refusal(capsys, *arguments)


def planned(size: str, gpu: str, gpus: int) -> tuple:
    config = evolve(RunConfig(), GPU_WORKLOAD)
    machine = Machine(gpu=gpu_called(gpu), gpus=gpus)
    shape = NAMED_SHAPES[size]
    return config, machine, shape, propose(config, machine, shape, shape_of_model)


@pytest.mark.parametrize(
    ("size", "gpu", "gpus"),
    [("1.5b", "h100", 1), ("1.5b", "rtx4090", 8), ("7b", "h100", 8), ("7b", "a100-80", 128)],
)
def test_a_proposal_fits_with_its_margin(size: str, gpu: str, gpus: int):
    config, machine, shape, proposal = planned(size, gpu, gpus)
    assert proposal.memory is not None
    changed = evolve(config, proposal.changes)  # its fields exist and do not contradict each other
    memory = plan_run(changed, machine, shape, shape_of_model)
    assert machine.gpu is not None
    assert memory.fits
    assert max(memory.training_gpu, memory.engine_gpu) <= (1 - MARGIN) * machine.gpu.memory


def test_a_model_whose_set_up_does_not_fit_gets_no_proposal():
    *_, proposal = planned("7b", "l40s", 1)
    assert proposal.memory is None
    assert any(line.startswith("set-up: a rank's GPU gets its shard") for line in proposal.reasons)


def test_the_default_step_on_gpus_is_that_of_the_recipe():
    hardware = Hardware(cpus=8, memory_gib=64, gpus=8, gpu_memory_gib=80)
    recipe = on_gpus(hardware)
    for name, value in GPU_WORKLOAD.items():
        section, field = name.split(".")
        assert getattr(getattr(recipe, section), field) == value
