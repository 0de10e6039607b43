"""The configuration of a pipeline: shared fields, results of stages, contradictions."""

import subprocess
import sys
from pathlib import Path

import pytest

from recipes.rlhf import rlhf
from rlsys.config import ConfigError
from rlsys.config.command_line import HelpRequested, dump_yaml, load_yaml, parse
from rlsys.config.fields import all_fields, field_at
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS
from rlsys.config.rlhf import (
    RESULTS,
    SHARED,
    RlhfRunConfig,
    named_in_pipeline,
    rlhf_contradictions,
    with_shared_fields,
)


def machine(gpus: int = 0) -> Hardware:
    return Hardware(cpus=8, memory_gib=64, gpus=gpus, gpu_memory_gib=80)


def configured(*flags: str) -> RlhfRunConfig:
    """Return the configuration of a command line, with the shared fields in all stages."""
    invocation = parse(rlhf(machine()), flags)
    return with_shared_fields(invocation.config, invocation.explicit)


@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_the_recipe_is_valid_and_survives_yaml(gpus: int, tmp_path: Path):
    config = rlhf(machine(gpus))
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    assert load_yaml(file, RlhfRunConfig) == config
    assert rlhf_contradictions(with_shared_fields(config, ())) == []


def test_the_recipe_trains_at_least_one_epoch_of_rankings_and_the_policy():
    config = configured()
    assert config.ppo.policy_steps > 0
    seen = config.reward_model.trainer.steps * config.reward_model.trainer.examples_per_step
    assert seen >= config.rankings.data.synthetic.train_size


def test_every_field_is_documented_and_in_the_help():
    names = [name for name, _ in all_fields(RlhfRunConfig)]
    assert [name for name, field in all_fields(RlhfRunConfig) if not field.description] == []
    with pytest.raises(HelpRequested) as shown:
        parse(rlhf(machine()), ["--help"])
    text = str(shown.value)
    assert [name for name in names if f"--{name} " not in text] == []
    assert {"sft.trainer.steps", "ppo.algorithm.kl.coefficient", "seed"} <= set(names)


def test_every_shared_field_and_every_result_exists():
    copies = [copy for shared in SHARED for copy in shared.copies]
    for name in (*(shared.field for shared in SHARED), *copies, *RESULTS):
        assert field_at(name, RlhfRunConfig) is not None, name
    assert not set(copies) & set(RESULTS)


def test_a_shared_field_is_filled_into_all_stages_that_have_it():
    config = configured(
        *("--seed", "7", "--model.path", "tiny", "--data.template", "chat_boxed"),
        *("--data.synthetic.levels", "1,2", "--plugins", "mine"),
    )
    seeds = (
        config.sft.trainer.seed,
        config.rankings.seed,
        config.reward_model.trainer.seed,
        config.ppo.trainer.seed,
    )
    assert seeds == (7, 7, 7, 7)
    stages = (config.sft, config.rankings, config.reward_model, config.ppo)
    assert [stage.data.template for stage in stages] == ["chat_boxed"] * 4
    assert [stage.plugins for stage in stages] == [("mine",)] * 4
    levels = [stage.data.synthetic.levels for stage in (config.sft, config.rankings, config.ppo)]
    assert levels == [(1, 2)] * 3
    assert config.sft.model.path == "tiny"


def test_a_source_of_data_is_shared_only_where_it_is_given():
    own = configured("--sft.data.train", "a.jsonl", "--ppo.data.train", "b.jsonl")
    sources = (own.sft.data.train, own.rankings.data.train, own.ppo.data.train)
    assert sources == ("a.jsonl", "synthetic", "b.jsonl")
    one = configured("--data.train", "c.jsonl")
    assert (one.sft.data.train, one.rankings.data.train, one.ppo.data.train) == ("c.jsonl",) * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sft.trainer.seed", "3"], "sft.trainer.seed: 3, but seed is 0 for all stages"),
        (["--ppo.data.template", "few_shot"], "ppo.data.template: 'few_shot', but data.template"),
        (
            ["--data.train", "a.jsonl", "--ppo.data.train", "b.jsonl"],
            "without data.train each stage has its own",
        ),
        (["--ppo.model.path", "x"], "ppo.model.path: it is always the last checkpoint of sft"),
        (["--rankings.output", "x"], "rankings.output: it is always a file in run.directory"),
        (["--reward_model.data.responses", "4"], "rankings.responses says how many"),
        (
            ["--reward_model.data.synthetic.levels", "2"],
            "reward_model.data.synthetic.levels: it has no effect in a pipeline",
        ),
        (["--sft.run.directory", "x"], "sft.run.directory: it is always a directory in"),
    ],
)
def test_a_stage_that_contradicts_the_pipeline_is_refused(flags: list[str], message: str):
    with pytest.raises(ConfigError) as refused:
        configured(*flags)
    assert message in str(refused.value)


def test_a_stage_may_repeat_the_value_of_a_shared_field():
    assert configured("--seed", "3", "--sft.trainer.seed", "3").ppo.trainer.seed == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.train", "a.jsonl"], "sft.data.eval: 'auto' holds problems out of 'a.jsonl'"),
        (["--ppo.data.train", "a.jsonl"], "ppo.data.eval: 'auto' holds problems out"),
        (["--ppo.reward.functions", "math"], "math leaves out the reward model"),
        (["--ppo.reward.functions", "[math, {name: model, weight: 0}]"], "the weight of model is"),
        (
            ["--ppo.reward.functions", "[{name: model, parameters: {path: x}}]"],
            "the path of model is 'x'",
        ),
        (["--compare_without_ptx", "true", "--last_stage", "sft"], "last_stage is 'sft'"),
        (
            ["--compare_without_ptx", "true", "--ppo.ptx.coefficient", "0"],
            "compares nothing, since ppo.ptx.coefficient is 0",
        ),
        (
            ["--compare_without_ptx", "true", "--ppo.ptx.eval", "off"],
            "no evaluation of ppo measures the loss of text",
        ),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(flags: list[str], message: str):
    lines = rlhf_contradictions(configured(*flags))
    assert any(message in line for line in lines), lines


def test_held_out_files_are_accepted():
    flags = ("--data.train", "a.jsonl", "--data.eval", "b.jsonl")
    assert rlhf_contradictions(configured(*flags)) == []


def test_the_comparison_differs_in_the_pretraining_text_alone():
    config = configured("--compare_without_ptx", "true", "--ppo.trainer.steps", "9")
    assert config.stages == ("sft", "rankings", "reward_model", "ppo", "ppo_without_ptx")
    ppo, without = config.stage("ppo"), config.stage("ppo_without_ptx")
    assert (ppo.ptx.coefficient, without.ptx.coefficient) == (1.0, 0.0)
    same = {"ptx": None}
    assert ppo.model_copy(update=same) == without.model_copy(update=same)
    assert (ppo.ptx.train, ppo.ptx.eval) == (without.ptx.train, without.ptx.eval)
    assert configured().stages == ("sft", "rankings", "reward_model", "ppo")
    assert configured("--last_stage", "rankings").stages == ("sft", "rankings")


def test_a_preset_of_the_ppo_stage_replaces_its_algorithm():
    config = configured("--ppo.preset", "rloo", "--ppo.algorithm.kl.coefficient", "0.5")
    assert config.ppo.algorithm.advantage == PRESETS["rloo"].algorithm.advantage
    assert config.ppo.algorithm.kl.coefficient == 0.5
    assert not config.ppo.critic.enabled
    with pytest.raises(ConfigError, match=r"ppo\.preset: unknown preset 'rlo'"):
        configured("--ppo.preset", "rlo")


def test_another_estimator_of_the_ppo_stage_starts_from_its_own_parameters():
    assert configured().ppo.algorithm.advantage.parameters
    config = configured("--ppo.algorithm.advantage.name", "rloo")
    assert config.ppo.algorithm.advantage.parameters == {}


@pytest.mark.parametrize(
    ("stage", "line", "named"),
    [
        ("sft", "trainer.steps: 0 is too few.", "sft.trainer.steps: 0 is too few."),
        (
            "ppo",
            "policy.num_mini_batches: 3 does not divide trainer.prompts_per_step 16.",
            "ppo.policy.num_mini_batches: 3 does not divide ppo.trainer.prompts_per_step 16.",
        ),
        ("sft", "model.path: 'x' is no model.", "model.path: 'x' is no model."),
        ("ppo", "model.path: 'x' is no model.", "model.path: 'x' is no model."),
        ("rankings", "data.template: 'x' is unknown", "data.template: 'x' is unknown"),
        ("sft", "data.train: 'x.jsonl' is gone", "sft.data.train: 'x.jsonl' is gone"),
        (
            "ppo",
            "reward.functions.parameters.path: 'x' is no model",
            "ppo.reward.functions.parameters.path: 'x' is no model",
        ),
        ("ppo_without_ptx", "ptx.train: 'x' is gone", "ppo.ptx.train: 'x' is gone"),
        ("sft", "it has no config.json, see model.safetensors", None),
    ],
)
def test_messages_name_the_fields_of_the_pipeline(stage: str, line: str, named: str | None):
    assert named_in_pipeline(line, configured(), stage) == (named or line)


def test_the_configuration_imports_neither_torch_nor_numpy():
    code = "import rlsys.config.rlhf, sys; print({'torch', 'numpy', 'ray'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
