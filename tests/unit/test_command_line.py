"""The command line: precedence, types, messages."""

from pathlib import Path

import pytest
import yaml

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.command_line import (
    ConfigError,
    HelpRequested,
    Invocation,
    all_fields,
    dump_yaml,
    evolve,
    flat,
    load_yaml,
    parse,
)
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS

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
        (["--policy.shared_prefix_packing", "false"], "policy.shared_prefix_packing", False),
        (["--policy.gradient_checkpointing"], "policy.gradient_checkpointing", True),
        (["--data.where", "{level: [1, 2]}"], "data.where", {"level": (1, 2)}),
        (["--data.where", "{level: 4, a.b: x}"], "data.where", {"level": (4,), "a.b": ("x",)}),
        (["--data.where.level", "1,2"], "data.where", {"level": (1, 2)}),
        (["--data.where.subject", "Number Theory"], "data.where", {"subject": ("Number Theory",)}),
        (["--data.where", "null"], "data.where", {}),
        (["--data.synthetic.levels", "[4]"], "data.synthetic.levels", (4,)),
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
        (["--reward.functions", "[{name: math"], "is not a valid YAML value"),
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
        {
            "data.where": {"level": [1, 5]},
            "algorithm.advantage.parameters": {"eps": 1e-4},
            "plugins": ["x"],
        },
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


def test_explicit_names_are_those_of_flags_and_of_what_a_file_says_otherwise(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(evolve(RECIPE, {"generation.top_k": 50})))  # a whole configuration
    flags = ["--config", str(file), "--trainer.prompts-per-step", "8", "--dry-run"]
    invocation = parse(RECIPE, [*flags, "--algorithm.advantage.parameters.eps", "1e-4"])
    assert invocation.explicit == {
        "generation.top_k",
        "trainer.prompts_per_step",  # a flag counts even where it repeats the recipe's value
        "algorithm.advantage.parameters.eps",
    }


def test_another_function_drops_the_parameters_of_the_one_before():
    recipe = evolve(RECIPE, {"algorithm.objective.parameters": {"clip_low": 0.1}})
    assert recipe.algorithm.objective.parameters == {"clip_low": 0.1}
    config = parse(recipe, ["--algorithm.objective.weight", "sapo"]).config
    assert config.algorithm.objective.parameters == {}
    same = parse(recipe, ["--algorithm.objective.weight", "ppo_clip"]).config
    assert same.algorithm.objective.parameters == {"clip_low": 0.1}
    flags = [
        "--algorithm.objective.parameters.tau_pos",
        "2",
        "--algorithm.objective.weight",
        "sapo",
    ]
    assert parse(recipe, flags).config.algorithm.objective.parameters == {"tau_pos": 2}
    assert evolve(recipe, {"algorithm.objective.weight": "cispo"}).algorithm.objective == (
        RECIPE.algorithm.objective.model_copy(update={"weight": "cispo"})
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume=false"], r"--resume: 'false' is no value of it.*--resume auto"),
        (["--resume", "always", "--trainer.steps", "1"], r"--resume: 'always' is no value of it"),
        (["--resume", "auto"], r"run\.directory: --resume auto needs.*Add --run\.directory"),
        (["--data.synthetic.levels", "1,{"], r"levels: '\{' is not a valid YAML value"),
        (["--policy.optimizer.betas", "1.5,0.9"], r"betas\.0: 1\.5 does not fit.*decay rates"),
    ],
)
def test_more_mistakes(arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        parsed(*arguments)


def test_a_file_that_is_no_text_or_has_numbers_as_names(tmp_path: Path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"--config: .*binary\.yaml' is not valid YAML"):
        parsed("--config", str(tmp_path / "binary.yaml"))
    (tmp_path / "number.yaml").write_text("1: 2\n")
    with pytest.raises(ConfigError, match="1: no such field"):
        parsed("--config", str(tmp_path / "number.yaml"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run that was started with flags of its own."""
    saved = evolve(
        RECIPE,
        {
            "policy.optimizer.learning_rate": 3e-4,
            "generation.samples_per_prompt": 4,
            "generation.dtype": "float32",
            "reward.functions": [{"name": "format_boxed"}],
        },
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(saved))
    return tmp_path / "run"


def resumed(run: Path, *flags: str) -> Invocation:
    return parse(RECIPE, ["--run.directory", str(run), "--resume", *flags])


def test_a_resume_starts_from_the_runs_own_configuration(run: Path):
    own = load_yaml(run / "config.yaml")
    invocation = resumed(run)
    assert invocation.config == evolve(own, {"run.directory": str(run)})
    assert invocation.config.policy.optimizer.learning_rate == 3e-4
    assert invocation.saved == flat(own.model_dump(mode="json"))


def test_flags_and_files_change_the_runs_own_configuration(run: Path, tmp_path: Path):
    (tmp_path / "more.yaml").write_text("trainer: {steps: 70, seed: 3}\n")
    flags = ["--config", str(tmp_path / "more.yaml"), "--trainer.seed", "4"]
    invocation = resumed(run, *flags)
    assert (invocation.config.trainer.steps, invocation.config.trainer.seed) == (70, 4)
    assert invocation.config.policy.optimizer.learning_rate == 3e-4
    assert invocation.explicit == {"trainer.steps", "trainer.seed", "run.directory"}


def test_the_directory_of_a_resume_may_stand_in_a_file(run: Path, tmp_path: Path):
    (tmp_path / "where.yaml").write_text(f"run: {{directory: {run}}}\n")
    invocation = parse(RECIPE, ["--resume", "--config", str(tmp_path / "where.yaml")])
    assert invocation.config.generation.samples_per_prompt == 4


def test_another_recipe_does_not_resume_a_run_unless_its_name_is_given(run: Path):
    other = evolve(RECIPE, {"recipe": "dapo_math"})
    flags = ["--run.directory", str(run), "--resume"]
    with pytest.raises(
        ConfigError, match=r"^recipe: this is dapo_math, .* grpo_math.*--recipe grpo_math"
    ):
        parse(other, flags)
    assert parse(other, [*flags, "--recipe", "grpo_math"]).config == resumed(run).config


def test_a_configuration_with_fields_of_another_version_is_refused_in_one_sentence(run: Path):
    with (run / "config.yaml").open("a") as file:
        file.write("sampling: {heat: 1}\n")
    with pytest.raises(ConfigError, match=r"run\.directory: .*another version.*sampling") as error:
        resumed(run)
    assert "\n" not in str(error.value)


def test_fields_that_an_older_version_did_not_have_take_their_defaults(run: Path):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    del tree["generation"]["top_k"], tree["diagnostics"]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert resumed(run).config.generation.top_k == 0
    assert "generation.top_k" not in (resumed(run).saved or {})


def test_a_saved_value_that_is_no_longer_allowed_can_be_given_anew(run: Path):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["trainer"]["evaluation"]["pass_at"] = [0]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"pass_at\.0: 0 does not fit.*from .*config\.yaml"):
        resumed(run)
    given = resumed(run, "--trainer.evaluation.pass_at", "1")
    assert given.config.trainer.evaluation.pass_at == (1,)


def test_a_resume_without_a_run(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"Add --run\.directory"):
        parse(RECIPE, ["--resume"])
    with pytest.raises(ConfigError, match="holds no run to resume"):
        resumed(tmp_path)


@pytest.mark.parametrize("words", [["--resume", "auto"], ["--resume=auto"]])
def test_an_automatic_resume_starts_the_run_where_there_is_none(tmp_path: Path, words: list[str]):
    flags = ["--run.directory", str(tmp_path / "new"), *words, "--trainer.steps", "7"]
    invocation = parse(RECIPE, flags)
    assert (invocation.resume, invocation.saved) == (False, None)
    assert invocation.config == evolve(
        RECIPE, {"run.directory": str(tmp_path / "new"), "trainer.steps": 7}
    )


def test_an_automatic_resume_continues_the_run_that_there_is(run: Path):
    flags = ["--run.directory", str(run), "--resume", "auto", "--trainer.steps", "7"]
    assert parse(RECIPE, flags) == resumed(run, "--trainer.steps", "7")


def test_an_automatic_resume_begins_anew_what_died_before_its_configuration(tmp_path: Path):
    """Such a run has taken its directory: only a resume may use it."""
    (tmp_path / "config.yaml").touch()
    invocation = parse(RECIPE, ["--run.directory", str(tmp_path), "--resume", "auto"])
    assert invocation.resume
    assert invocation.config == evolve(RECIPE, {"run.directory": str(tmp_path)})
    assert invocation.saved == flat(invocation.config.model_dump(mode="json"))  # nothing changed


GSPO = PRESETS["gspo"].algorithm
TWO_STEPS = ("--trainer.steps", "2")


def test_a_preset_replaces_the_algorithm_and_what_goes_with_it():
    invocation = parse(RECIPE, ["--preset", "gspo", *TWO_STEPS])
    assert invocation.config.algorithm == GSPO
    assert invocation.config.policy == RECIPE.policy.model_copy(update={"num_mini_batches": 2})
    assert invocation.config.preset == "gspo"
    assert invocation.explicit == {"preset", "trainer.steps"}
    assert evolve(RECIPE, {"preset": "gspo"}) == parse(RECIPE, ["--preset=gspo"]).config


def test_the_file_and_flags_win_over_the_preset_wherever_it_stands(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("algorithm: {kl: {coefficient: 0.5}, objective: {parameters: {clip_low: 0.1}}}")
    flags = ["--policy.num_mini_batches", "4", "--config", str(file), "--preset", "gspo"]
    config = parsed(*flags)
    assert config.policy.num_mini_batches == 4
    assert config.algorithm.kl.coefficient == 0.5
    assert config.algorithm.objective.parameters == {"clip_low": 0.1}
    assert config.algorithm.objective.ratio == "sequence"


def test_a_preset_may_stand_in_a_file_and_a_flag_replaces_it(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: sapo\n")
    assert parsed("--config", str(file)).algorithm == PRESETS["sapo"].algorithm
    assert parsed("--config", str(file), "--preset", "gspo").algorithm == GSPO


def test_a_whole_configuration_with_a_preset_comes_back_as_it_was(tmp_path: Path):
    config = evolve(RECIPE, {"preset": "gspo", "algorithm.objective.weight": "sapo"})
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(config))
    assert parsed("--config", str(file)) == config
    assert load_yaml(file) == config


@pytest.mark.parametrize("name", ["gsop", "GRPO"])
def test_an_unknown_preset_is_refused_with_the_nearest(name: str):
    with pytest.raises(ConfigError, match=f"^preset: unknown preset '{name}'"):
        parsed("--preset", name)
    with pytest.raises(ConfigError, match="Did you mean gspo"):
        evolve(RECIPE, {"preset": "gsop"})
    with pytest.raises(ValueError, match="Did you mean gspo"):
        RunConfig(preset="gsop")


def test_a_configuration_that_names_a_preset_has_its_algorithm():
    assert RunConfig(preset="gspo").algorithm == GSPO
    assert RunConfig(preset="gspo").policy.num_mini_batches == 2


def test_help_lists_every_preset():
    with pytest.raises(HelpRequested) as request:
        parse(RECIPE, ["--help"])
    text = " ".join(str(request.value).split())
    for name, preset in PRESETS.items():
        assert f" {name} {' '.join(preset.description.split())}" in text


def test_a_resumed_run_may_take_another_preset(run: Path):
    own = load_yaml(run / "config.yaml")
    invocation = resumed(run, "--preset", "gspo", "--algorithm.kl.coefficient", "0.1")
    assert invocation.config.algorithm.objective == GSPO.objective
    assert invocation.config.algorithm.kl.coefficient == 0.1
    assert invocation.config.generation == own.generation
    assert invocation.explicit == {"preset", "algorithm.kl.coefficient", "run.directory"}
    assert resumed(run).config.algorithm == own.algorithm
