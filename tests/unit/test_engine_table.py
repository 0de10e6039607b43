"""The table of engines: each name has a module with an engine, and options that exist."""

import fnmatch
import importlib
from typing import Any

import pytest

from rlsys.config import GenerationConfig, RunConfig
from rlsys.config.engines import ENGINES
from rlsys.run.engine_arguments import engine_arguments
from workers.generation.engines import make_engine
from workers.generation.engines.engine import RolloutEngine
from workers.generation.engines.vllm import engine_settings, parts_of


@pytest.mark.parametrize("name", ENGINES)
def test_every_name_has_a_module_with_an_engine(name: str):
    engine = importlib.import_module(f"workers.generation.engines.{name}").ENGINE
    methods = {name for name in vars(RolloutEngine) if not name.startswith("_")}
    assert methods <= set(dir(engine))


@pytest.mark.parametrize("name", ENGINES)
def test_options_of_engines_are_fields(name: str):
    assert ENGINES[name].options <= set(GenerationConfig.model_fields)


@pytest.mark.parametrize("name", ENGINES)
def test_refused_arguments_exist(name: str):
    traits = ENGINES[name]
    known = engine_arguments(traits)
    assert bool(known) == bool(traits.arguments_class)
    unknown = [
        refused for refused in traits.refused_arguments if not fnmatch.filter(known, refused)
    ]
    assert unknown == []


def test_vllm_gets_the_arguments_of_the_configuration():
    arguments = {"max_num_seqs": 3, "block_size": 64}
    config = RunConfig(generation=GenerationConfig(dtype="float32", engine_arguments=arguments))
    assert arguments.items() <= engine_settings(config, "model").items()


def test_an_entry_and_a_module_are_all_that_an_engine_needs(monkeypatch: pytest.MonkeyPatch):
    built: list[tuple] = []
    module = type("Module", (), {"ENGINE": lambda *arguments: built.append(arguments)})
    table: Any = ENGINES
    monkeypatch.setitem(table, "toy", ENGINES["transformers"])
    monkeypatch.setattr(importlib, "import_module", {"workers.generation.engines.toy": module}.get)

    config = RunConfig(generation=GenerationConfig(engine="toy"))
    make_engine(config, "model")
    assert built == [(config, "model")]


def test_fused_parameters_hold_several_weights():
    sent = ["0.q_proj.weight", "0.k_proj.weight", "0.o_proj.weight", "1.q_proj.weight"]
    held = ["0.qkv_proj.weight", "0.o_proj.weight", "1.q_proj.weight"]  # 1 is not fused
    assert parts_of(sent, held) == {
        "0.qkv_proj.weight": ("0.q_proj.weight", "0.k_proj.weight"),
        "0.o_proj.weight": ("0.o_proj.weight",),
        "1.q_proj.weight": ("1.q_proj.weight",),
    }
