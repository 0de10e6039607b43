"""The command line: precedence, types, messages."""

from pathlib import Path

import pytest
import yaml

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.command_line import (
    ConfigError,
    HelpRequested,
    all_fields,
    dump_yaml,
    evolve,
    load_yaml,
    parse,
)
from rlsys.config.hardware import Hardware

CPU = Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
RECIPE = grpo_math(CPU)


def parsed(*arguments: str) -> RunConfig:
    return parse(RECIPE, arguments).config


def test_flags_win_over_the_file_which_wins_over_the_recipe(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump(
            {"trainer": {"steps": 7, "seed": 3}, "algorithm": {"advantage": {"name": "rloo"}}}
        )
    )
    config = parsed("--trainer.seed", "9", "--config", str(file))
    assert (config.trainer.steps, config.trainer.seed) == (7, 9)
    assert config.algorithm.advantage.name == "rloo"
    assert config.generation == RECIPE.generation


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--policy.optimizer.learning_rate", "1e-5"], "policy.optimizer.learning_rate", 1e-5),
        (["--trainer.steps=12"], "trainer.steps", 12),
        (["--policy.share_prompts", "false"], "policy.share_prompts", False),
        (["--policy.gradient_checkpointing"], "policy.gradient_checkpointing", True),
        (["--data.levels", "1,2"], "data.levels", (1, 2)),
        (["--data.levels", "[4]"], "data.levels", (4,)),
        (["--data.levels", "null"], "data.levels", None),
        (["--plugins", "a,b.c"], "plugins", ("a", "b.c")),
        (["--generation.stop", "</answer>"], "generation.stop", ("</answer>",)),
        (
            ["--algorithm.advantage.parameters.std_ddof", "1"],
            "algorithm.advantage.parameters",
            {"std_ddof": 1},
        ),
        (["--run.directory", "2026"], "run.directory", "2026"),  # text stays text
        (["--policy.optimizer.betas", "0.8,0.9"], "policy.optimizer.betas", (0.8, 0.9)),
    ],
)
def test_values(arguments: list[str], field: str, value: object):
    found: object = parsed(*arguments)
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value


def test_reward_functions_as_yaml():
    config = parsed("--reward.functions", "[{name: math}, {name: format_boxed, weight: 0.1}]")
    assert [(f.name, f.weight) for f in config.reward.functions] == [
        ("math", 1.0),
        ("format_boxed", 0.1),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--trainer.step", "5"],
            r"--trainer\.step: no such flag\. Did you mean .*--trainer\.steps",
        ),
        (["--steps", "5"], r"--steps: no such flag\. Did you mean .*--trainer\.steps"),
        (
            ["--trainer.steps", "many"],
            r"trainer\.steps: 'many' does not fit: input should be a valid integer.*Training steps",
        ),
        (
            ["--trainer.steps", "0"],
            r"trainer\.steps: 0 does not fit: input should be greater than or equal to 1",
        ),
        (["--trainer.steps"], r"trainer\.steps: a value is missing"),
        (["stray"], "'stray': expected a flag"),
        (
            ["--generation.engine", "vlm"],
            r"generation\.engine: 'vlm' does not fit: input should be 'vllm' or 'transformers'",
        ),
        (["--config", "/no/file.yaml"], r"--config: cannot read '/no/file\.yaml'"),
        (["--reward.functions", "[{name: math"], "is no YAML value"),
    ],
)
def test_mistakes_get_one_clear_message(arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message) as error:
        parsed(*arguments)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_reported_at_once(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("trainer: {stepps: 3}\npolicy: {ranks: 0}\n")
    with pytest.raises(ConfigError) as error:
        parsed("--config", str(file))
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert any(
        line.startswith("trainer.stepps: no such field. Did you mean steps") for line in lines
    )
    assert any(line.startswith("policy.ranks: 0 does not fit") for line in lines)


def test_help_shows_every_field_with_its_documentation_and_the_recipes_default():
    with pytest.raises(HelpRequested) as request:
        parse(RECIPE, ["--help"])
    text = " ".join(str(request.value).split())
    for name, field in all_fields():
        assert f"--{name} " in text
        assert field.description
        assert " ".join(field.description.split())[:30] in text
    assert "[smollm2-135m]" in text


def test_yaml_round_trip(tmp_path: Path):
    config = evolve(
        RECIPE,
        {"data.levels": [1, 5], "algorithm.advantage.parameters": {"eps": 1e-4}, "plugins": ["x"]},
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_yaml(tmp_path / "config.yaml") == config


def test_every_field_is_documented():
    assert [name for name, field in all_fields() if not field.description] == []


def test_a_gpu_changes_the_defaults():
    one, many = (
        grpo_math(Hardware(cpus=16, memory_gib=128.0, gpus=n, gpu_memory_gib=80.0)) for n in (1, 8)
    )
    assert one.model.path == "qwen2.5-math-1.5b"
    assert one.policy.gpus_per_rank + one.generation.gpus_per_worker == 1.0
    assert (many.policy.ranks, many.generation.workers) == (4, 4)
