"""Configurations of expert iteration and of its grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.expert_iteration_grid import expert_iteration_grid
from recipes.expert_iteration_math import expert_iteration_math
from recipes.run_expert_grid import planned_runs
from rlsys.config import ConfigError
from rlsys.config.command_line import HelpRequested, dump_yaml, evolve, load_yaml, parse
from rlsys.config.expert_grid import ExpertGridConfig, GridConfig, cells_of, grid_mistakes
from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.config.fields import all_fields
from rlsys.config.hardware import Hardware
from rlsys.driver.sampling import sampling_parameters
from rlsys.run.directory import RunDirectory

RECIPES = (expert_iteration_math, expert_iteration_grid)


def machine(gpus: int = 0) -> Hardware:
    return Hardware(cpus=8, memory_gib=64, gpus=gpus, gpu_memory_gib=80)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_recipes_are_valid_and_survive_yaml(recipe: Any, gpus: int, tmp_path: Path):
    config = recipe(machine(gpus))
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    assert load_yaml(file, type(config)) == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_every_field_of_the_kind(recipe: Any):
    config = recipe(machine())
    with pytest.raises(HelpRequested) as shown:
        parse(config, ["--help"])
    text = str(shown.value)
    assert [name for name, _ in all_fields(type(config)) if f"--{name} " not in text] == []
    assert [name for name, field in all_fields(type(config)) if not field.description] == []
    assert "--algorithm.advantage.name" not in text
    assert "--policy.num_mini_batches" not in text


def test_the_quantities_of_the_literature_are_flags():
    """n_ei_steps 5, D_b 512, G 4, 2 epochs, at least 4 tokens."""
    flags = (
        *("--trainer.steps", "5", "--trainer.prompts_per_step", "512"),
        *("--generation.samples_per_prompt", "4", "--expert.epochs", "2"),
        *("--generation.min_tokens", "4", "--data.template", "r1_zero"),
    )
    config = parse(expert_iteration_math(machine(1)), flags).config
    online = config.online()
    assert (online.trainer.steps, online.trainer.prompts_per_step) == (5, 512)
    assert (online.generation.samples_per_prompt, online.generation.min_tokens) == (4, 4)
    assert config.expert.epochs == 2
    sampling = sampling_parameters(online, samples=4, temperature=1.0, seed=0)
    assert (sampling.stop, sampling.min_tokens) == (("</answer>",), 4)


def test_one_sample_per_problem_is_enough():
    """Nothing is compared within a group, so the RL run behind it must not ask for two."""
    from rlsys.run.preflight import config_mistakes

    config = evolve(expert_iteration_math(machine()), {"generation.samples_per_prompt": 1})
    directory = RunDirectory(Path("runs/never-made"))
    assert config_mistakes(config.online(), directory, machine(), resume=False) == []


def test_the_online_run_has_the_same_sections_and_no_reference():
    config = expert_iteration_math(machine())
    online = config.online()
    sections = ("model", "data", "generation", "sync", "reward", "trainer", "cluster", "run")
    for section in sections:
        assert getattr(online, section) == getattr(config, section)
    assert online.algorithm.kl.coefficient == 0
    assert not online.critic.enabled
    assert config.reference_role() is None
    assert config.longest_response == config.generation.max_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy.ranks": 4, "expert.examples_per_update": 2}, "4 ranks for the 2 responses"),
        ({"generation.min_tokens": 20}, r"generation\.min_tokens: 20 is above"),
        ({"generation.workers": 65}, r"generation\.workers: 65 workers share the 64 prompts"),
        ({"trainer.max_staleness": 1}, r"trainer\.max_staleness: 1 is for RL runs"),
        ({"expert.epochs": 0}, r"expert\.epochs"),
        ({"policy.num_mini_batches": 2}, "num_mini_batches"),
        ({"algorithm.advantage.name": "rloo"}, "algorithm"),
        ({"grid.samples": [2]}, "grid"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        evolve(expert_iteration_math(machine()), changes)


def test_a_grid_is_every_combination_once_the_cheapest_first():
    grid = GridConfig(samples=(4, 2, 4), epochs=(1,), problems=(64, 32))
    cells = [(cell.problems, cell.samples, cell.epochs) for cell in cells_of(grid)]
    assert cells == [(32, 2, 1), (32, 4, 1), (64, 2, 1), (64, 4, 1)]
    assert len({cell.name for cell in cells_of(grid)}) == 4


def test_a_run_of_a_grid_is_the_recipe_with_the_values_of_its_combination(tmp_path: Path):
    flags = {"grid.samples": [2, 4], "grid.epochs": [3], "grid.problems": [16]}
    grid = evolve(expert_iteration_grid(machine()), {**flags, "trainer.steps": 7})
    runs = planned_runs(grid, RunDirectory(tmp_path))
    assert [run.config.generation.samples_per_prompt for run in runs] == [2, 4]
    for run in runs:
        config = run.config
        assert isinstance(config, ExpertIterationRunConfig)
        assert not isinstance(config, ExpertGridConfig)
        assert (config.expert.epochs, config.trainer.prompts_per_step) == (3, 16)
        assert (config.trainer.steps, config.recipe) == (7, "expert_iteration_math")
        assert config.run.directory == str(tmp_path / run.cell.name)


def test_the_command_of_a_run_gives_its_configuration(tmp_path: Path):
    """What the file of overrides changes is exactly what the grid's flags and values change."""
    grid = evolve(
        expert_iteration_grid(machine()),
        {"grid.samples": [2], "grid.problems": [16], "reward.functions": ["math", "format_boxed"]},
    )
    run = planned_runs(grid, RunDirectory(tmp_path / "grid"))[0]
    file = tmp_path / "overrides.yaml"
    overrides = run.overrides(machine())
    file.write_text(yaml.safe_dump(overrides))
    command = run.command(file)
    assert command[1:3] == ["-m", "recipes.expert_iteration_math"]
    invocation = parse(expert_iteration_math(machine()), command[3:])
    assert invocation.config == run.config
    assert not invocation.resume
    assert "generation.max_tokens" not in invocation.explicit


def test_a_resumed_run_of_a_grid_gets_the_changes_since_it_started(tmp_path: Path):
    """Also where the new value is the default of the recipe; what was `auto` stays as chosen."""
    grid = evolve(expert_iteration_grid(machine()), {"trainer.steps": 3})
    run = planned_runs(grid, RunDirectory(tmp_path))[0]
    resolved = {"generation.dtype": "float32", "policy.compute_dtype": "float32"}
    run.directory.create(evolve(run.config, resolved))
    assert run.exists
    assert not run.is_finished
    assert run.overrides(machine()) == {}

    longer = planned_runs(evolve(grid, {"trainer.steps": 5}), RunDirectory(tmp_path))[0]
    assert expert_iteration_math(machine()).trainer.steps == 5
    assert longer.overrides(machine()) == {"trainer": {"steps": 5}}
    assert longer.command(tmp_path / "file.yaml")[-1] == "--resume"


def test_a_flag_that_the_grid_would_overwrite_is_refused():
    flags = ["--generation.samples_per_prompt", "3", "--trainer.steps", "2"]
    invocation = parse(expert_iteration_grid(machine()), flags)
    assert list(grid_mistakes(invocation.config, invocation.explicit)) == [
        "generation.samples_per_prompt: the grid sets it, to each of grid.samples 2, 4. Use "
        "--grid.samples."
    ]
