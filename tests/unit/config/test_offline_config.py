"""Configurations of runs on examples."""

import subprocess
import sys
from typing import Any

import pytest

from recipes.dpo_math import dpo_math
from recipes.process_reward_model_math import process_reward_model_math
from recipes.reward_model_math import reward_model_math
from recipes.sft_math import sft_math
from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import HelpRequested, dump_yaml, evolve, load_yaml, parse
from rlsys.config.fields import all_fields
from rlsys.config.hardware import Hardware
from rlsys.config.offline import (
    OfflineRunConfig,
    PreferenceRunConfig,
    ProcessRewardModelRunConfig,
    RewardModelRunConfig,
    SupervisedRunConfig,
)

KINDS = (
    SupervisedRunConfig,
    PreferenceRunConfig,
    RewardModelRunConfig,
    ProcessRewardModelRunConfig,
)
RECIPES = (sft_math, dpo_math, reward_model_math, process_reward_model_math)


def machine(gpus: int = 0) -> Hardware:
    return Hardware(cpus=8, memory_gib=64, gpus=gpus, gpu_memory_gib=80)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_recipes_are_valid_and_survive_yaml(recipe: Any, gpus: int, tmp_path: Any):
    config = recipe(machine(gpus))
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    assert load_yaml(file, type(config)) == config


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_documented(kind: type[OfflineRunConfig]):
    assert [name for name, field in all_fields(kind) if not field.description] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_every_field_of_the_kind(recipe: Any):
    config = recipe(machine())
    with pytest.raises(HelpRequested) as shown:
        parse(config, ["--help"])
    text = str(shown.value)
    assert [name for name, _ in all_fields(type(config)) if f"--{name} " not in text] == []
    assert "--algorithm.advantage.name" not in text


def test_options_of_other_kinds_of_runs_are_refused():
    for recipe, flag in (
        (sft_math, "--algorithm.advantage.name=rloo"),
        (sft_math, "--objective.beta=0.2"),
        (sft_math, "--generation.samples_per_prompt=8"),
        (sft_math, "--preset=grpo"),
        (reward_model_math, "--generation.max_tokens=8"),
        (reward_model_math, "--policy.ranks=1"),
        (dpo_math, "--objective.margin=1"),
    ):
        with pytest.raises(ConfigError, match="no such flag"):
            parse(recipe(machine()), [flag])


def test_the_file_of_another_kind_is_refused(tmp_path: Any):
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(RunConfig()))
    with pytest.raises(ConfigError, match="algorithm: no such field"):
        parse(sft_math(machine()), ["--config", str(file)])


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (
            sft_math,
            ["--policy.ranks", "64", "--trainer.examples_per_step", "8"],
            r"policy\.ranks: 64 ranks for the 8 examples",
        ),
        (
            reward_model_math,
            ["--reward_model.ranks", "64", "--trainer.examples_per_step", "8"],
            r"reward_model\.ranks: 64 ranks",
        ),
        (
            reward_model_math,
            [
                *("--reward_model.optimizer.weight_decay", "10"),
                *("--reward_model.optimizer.learning_rate", "1"),
            ],
            r"reward_model\.optimizer\.weight_decay: 10",
        ),
        (
            reward_model_math,
            ["--objective.kind", "plackett_luce", "--objective.margin", "1"],
            r"objective\.margin: 1 is for kind 'pairwise'",
        ),
        (
            dpo_math,
            ["--objective.kind", "ipo", "--objective.label_smoothing", "0.1"],
            r"objective\.label_smoothing: 0\.1 is not defined",
        ),
        (
            dpo_math,
            ["--trainer.evaluation.pass_at", "4"],
            r"trainer\.evaluation\.pass_at: pass@4",
        ),
    ],
)
def test_contradictions_are_refused_under_the_names_of_the_kind(
    recipe: Any, flags: list[str], message: str
):
    config = parse(recipe(machine()), flags).config
    with pytest.raises(ValueError, match=message):
        type(config).model_validate(config.model_dump())


def test_the_rl_run_of_an_evaluation_has_the_same_model_engine_and_rewards():
    changes = {
        "generation.engine": "transformers",
        "generation.max_tokens": 77,
        "data.template": "few_shot",
        "trainer.evaluation.temperature": 0.5,
        "policy.compute_dtype": "float32",
    }
    config = evolve(dpo_math(machine()), changes)
    online = config.online()
    assert online.model == config.model
    assert online.generation.max_tokens == 77
    assert online.data.template == "few_shot"
    assert online.trainer.evaluation.temperature == 0.5
    assert online.reference_role().compute_dtype == "float32"
    assert config.online(longest_response=300).generation.max_tokens == 300


def test_the_configuration_imports_neither_torch_nor_numpy():
    code = "import rlsys.config.offline, sys; print({'torch', 'numpy', 'ray'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
