"""Facts read from a model directory, and the files that a saved model copies from it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlsys.models import resolve_model
from rlsys.models.checkpoint_names import from_checkpoint, names_without_mapping, to_checkpoint
from rlsys.models.loading import (
    CAUSAL_LMS,
    context_length,
    end_token_ids,
    load_tokenizer,
    longest_window,
)
from rlsys.models.saving import copy_model_files
from tests.support.model_families import build_family, load_family


def test_everything_but_weights_is_copied(tmp_path: Path):
    kept = [
        "config.json",
        "generation_config.json",
        "modeling_mine.py",
        "qwen.tiktoken",
        "source.spm",
        "tokenizer.model",
        "merges.txt",
        "LICENSE",
        "chat_template.jinja",
        "code/layers.py",
        "assets/picture.png",
    ]
    dropped = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.safetensors.index.fp16.json",
        "old.pt",
        "old.pth",
        "model.gguf",
        "tf_model.h5",
        "flax_model.msgpack",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        ".gitattributes",
        ".cache/file.json",
        "__pycache__/modeling_mine.pyc",
        "rlsys_manifest.json",
        "manifest.json",
        "trainer_state.json",
        "optimizer_rank0.pt",
    ]
    for name in kept + dropped:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    copy_model_files(tmp_path / "model", tmp_path / "saved")
    found = [file.relative_to(tmp_path / "saved") for file in (tmp_path / "saved").rglob("*")]
    assert {str(name) for name in found if (tmp_path / "saved" / name).is_file()} == set(kept)
    assert (tmp_path / "saved/code/layers.py").read_text() == "code/layers.py"


def test_a_run_inside_the_model_directory_is_not_copied_into_itself(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    target = tmp_path / "runs" / "one" / "checkpoints" / "step_1"
    (target.parent / "step_0").mkdir(parents=True)
    (target.parent / "step_0" / "config.json").write_text("{}")
    copy_model_files(tmp_path, target)
    assert [file.name for file in target.rglob("*")] == ["config.json"]


def tokenizer_with_end(token: int | None) -> Any:
    return SimpleNamespace(eos_token_id=token)


@pytest.mark.parametrize(
    ("generation", "config", "own", "expected"),
    [
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 3}, 4, {1, 2, 4}),
        ({"eos_token_id": 1}, {"eos_token_id": [3]}, 1, {1}),
        ({"eos_token_id": None}, {"eos_token_id": [3, 5]}, None, {3, 5}),
        (None, {"eos_token_id": None}, 4, {4}),
        (None, {"text_config": {"eos_token_id": 6}}, None, {6}),
        (None, {}, None, set()),
        ({"eos_token_id": 0}, {}, None, {0}),
    ],
)
def test_end_tokens(tmp_path: Path, generation: Any, config: Any, own: Any, expected: set[int]):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_token_ids(tmp_path, tokenizer_with_end(own)) == expected


def test_windows_and_positions_of_configs(tmp_path: Path):
    def saved(name: str) -> Path:
        directory = tmp_path / name.replace("/", "-")
        build_family(name, directory)
        return directory

    assert longest_window(saved("mistral")) == 16
    assert longest_window(saved("qwen2/window")) == 16
    assert longest_window(saved("qwen2")) is None  # the config has a window that it does not use
    assert longest_window(saved("llama")) is None
    (tmp_path / "composite").mkdir()
    text = {"text_config": {"max_position_embeddings": 77}}
    (tmp_path / "composite" / "config.json").write_text(json.dumps(text))
    assert context_length(tmp_path / "composite") == 77


EXPERT_MODELS = ("qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("family", [*EXPERT_MODELS, "llama", "gemma2", "gpt_neox"])
def test_weights_leave_under_the_names_of_the_checkpoint_and_come_back(family: str, tmp_path: Path):
    build_family(family, tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    model = load_family(tmp_path, seed=2)
    exported = to_checkpoint(model, model.state_dict())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(exported) - tied == set(on_disk) - tied
    assert all(exported[name].shape == on_disk[name].shape for name in on_disk)
    assert names_without_mapping(model, tmp_path) == []

    other = load_family(tmp_path, seed=3)
    back = from_checkpoint(other, exported)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_a_module_made_from_files_in_its_own_names_is_exported_in_those_of_checkpoints(
    tmp_path: Path,
):
    build_family("qwen3_moe", tmp_path)
    model = load_family(tmp_path, seed=2)
    expected = set(to_checkpoint(model, model.state_dict()))
    made: Any = AutoModelForCausalLM.from_config(model.config)
    made._weight_conversions = []  # what loading leaves where it converted nothing
    assert set(to_checkpoint(made, model.state_dict())) == expected


def test_missing_weights_of_a_checkpoint_are_named(tmp_path: Path):
    build_family("mixtral", tmp_path)
    model = load_family(tmp_path, seed=2)
    exported = to_checkpoint(model, model.state_dict())
    del exported["model.norm.weight"]
    with pytest.raises(ValueError, match=r"no weights for model\.norm\.weight"):
        from_checkpoint(model, exported)


def test_stacked_weights_without_a_way_back_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build_family("qwen3_moe", tmp_path)
    model = load_family(tmp_path, seed=2)
    monkeypatch.setattr(
        "transformers.core_model_loading.revert_weight_conversion", lambda model, weights: weights
    )
    names = names_without_mapping(model, tmp_path)
    assert names[0] == "model.layers.0.mlp.experts.down_proj"
    assert len(names) == 4
    (tmp_path / "model.safetensors").unlink()
    assert names_without_mapping(model, tmp_path) == []  # nothing to compare with


def test_trust_reaches_the_tokenizer(tmp_path: Path):
    """A tokenizer in Python code beside the model loads where it is trusted, and only there."""
    shutil.copytree(resolve_model("tiny"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenization_mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class MineTokenizer(PreTrainedTokenizerFast):\n    mine = True\n"
    )
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}
    settings["tokenizer_class"] = "MineTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer: Any = load_tokenizer(tmp_path, trust_remote_code=True)
    assert tokenizer.mine
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(tmp_path)


def test_rows_of_the_tables_of_transformers_are_in_them():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= CAUSAL_LMS


@pytest.mark.parametrize("changed", [{}, {"tokenizer_class": "LlamaTokenizer"}])
def test_the_tokenizer_is_the_one_that_transformers_chooses(changed: dict, tmp_path: Path):
    shutil.copytree(resolve_model("tiny"), tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    chosen = AutoTokenizer.from_pretrained(tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    assert type(loaded) is type(chosen)
    text = "Problem: Ann has 3.\n<|im_end|> \\boxed{4}"
    assert loaded(text)["input_ids"] == chosen(text)["input_ids"]
    assert loaded.special_tokens_map == chosen.special_tokens_map
    assert loaded.chat_template == chosen.chat_template


def test_the_checks_of_a_run_load_no_models():
    """The driver tokenizes the prompts, and importing models as well would take it seconds."""
    script = (
        "import sys\n"
        "from recipes.grpo_math import on_cpu\n"
        "from recipes.run_recipe import run_recipe\n"
        "try:\n"
        "    run_recipe(on_cpu, ['--model.path', 'tiny', '--dry-run'])\n"
        "finally:\n"
        "    heavy = ('torch._dynamo', 'transformers.modeling_utils')\n"
        "    print('loaded:', [name for name in heavy if name in sys.modules])"
    )
    resolve_model("tiny")  # building it takes its classes
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded: []\n")
