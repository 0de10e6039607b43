"""Presets on the recipes of a CPU and a GPU machine pass all checks and have a description."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.grpo_math import grpo_math
from rlsys.config.command_line import evolve, parse
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS
from rlsys.run.config_warnings import config_warnings
from rlsys.run.directory import RunDirectory
from rlsys.run.ineffective_options import ineffective_options
from rlsys.run.preflight import config_mistakes

CPU = Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_on_the_default_recipe_without_a_warning(name: str, tmp_path: Path):
    invocation = parse(grpo_math(CPU), ["--preset", name, "--model.path", "tiny"])
    directory = RunDirectory(tmp_path / "run")
    assert config_mistakes(invocation.config, directory, CPU, resume=False) == []
    assert list(config_warnings(invocation.config)) == []
    assert list(ineffective_options(invocation.config, invocation.explicit, CPU)) == []


def test_the_recipe_is_the_preset_grpo_but_for_what_both_say():
    recipe, preset = grpo_math(CPU).algorithm, PRESETS["grpo"].algorithm
    assert (recipe.aggregation, recipe.kl.coefficient) == ("token_mean", 0.0)
    assert (preset.aggregation, preset.kl.coefficient) == ("sequence_mean", 0.04)
    same = {"algorithm.aggregation": "token_mean", "algorithm.kl.coefficient": 0.0}
    assert evolve(grpo_math(CPU), {"preset": "grpo"} | same).algorithm == recipe


@pytest.mark.parametrize("name", PRESETS)
def test_the_description_is_short(name: str):
    description = PRESETS[name].description
    assert description.endswith(".")
    assert len(description) < 160
